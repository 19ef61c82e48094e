"""Files are read without running them; what does not fit is refused and listed; what was converted loads again."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import resnet18, resnet50

import detector
from detector.backbone import ResNet, SingleLevel
from detector.commands.weights import main
from detector.heads import BoxHead, ResNetTrunk
from detector.model import TwoStageDetector
from detector.roi import RoIAlign
from detector.rpn import RPN
from detector.weights import load_foreign, load_into
from tests.tiny import tiny_model


class Malicious:
    """Whoever unpickles it carelessly creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_is_not_executed(tmp_path):
    for name, write in (("a.pkl", lambda o, p: p.write_bytes(pickle.dumps(o))), ("a.pth", torch.save)):
        write({"model": {"stem.conv1.weight": np.zeros(3)}, "x": Malicious(tmp_path / "ran")}, tmp_path / name)
        if name.endswith("pkl"):
            with pytest.raises(ValueError, match="open, which is not part of a numpy array"):
                load_foreign(tmp_path / name)
        else:  # carried along unread, the weights themselves are missing
            with pytest.raises(ValueError, match="found no tensors"):
                load_foreign(tmp_path / name)
        assert not (tmp_path / "ran").exists()


class History:
    """Stands for what training frameworks leave in their checkpoints."""

    def __init__(self):
        self.values = [1.0]


def test_objects_beside_the_weights_are_passed_over(tmp_path):
    state = {f"backbone.{k}": v for k, v in resnet18().state_dict().items()} | {"roi_head.x": torch.zeros(1)}
    del state["roi_head.x"]
    torch.save({"meta": {"epoch": 12}, "message_hub": History(), "state_dict": state}, tmp_path / "epoch_12.pth")
    weights = load_foreign(tmp_path / "epoch_12.pth", source="mmdet")
    assert set(weights.state_dict) == {key for key in state if not key.startswith("backbone.fc.")}


def caffe2_backbone() -> dict[str, np.ndarray]:
    """The names of MSRA's R-50.pkl, with torchvision's shapes."""
    blobs = {"conv1_b": np.zeros(64), "fc1000_w": np.zeros((1000, 2048)), "fc1000_b": np.zeros(1000)}
    for key, value in resnet50().state_dict().items():
        value = value.numpy().copy()
        part = key.split(".")
        if part[0] in ("fc",) or part[-1] in ("running_mean", "running_var", "num_batches_tracked"):
            continue
        end = {"weight": "s", "bias": "b"}[part[-1]]
        if key.startswith("conv1"):
            blobs["conv1_w"] = value
        elif key.startswith("bn1"):
            blobs[f"res_conv1_bn_{end}"] = value
        else:
            name = f"res{int(part[0][-1]) + 1}_{part[1]}_branch"
            if part[2] == "downsample":
                blobs[name + ("1_w" if part[3] == "0" else f"1_bn_{end}")] = value
            else:
                letter = "abc"[int(part[2][-1]) - 1]
                blobs[f"{name}2{letter}" + ("_w" if part[2].startswith("conv") else f"_bn_{end}")] = value
    return blobs


def test_caffe2_backbones(tmp_path):
    blobs = caffe2_backbone()
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(blobs, protocol=2))
    state, presets = load_foreign(tmp_path / "R-50.pkl")
    assert presets["channel_order"] == "bgr" and presets["backbone.stride_in_1x1"] is True
    assert presets["pixel_mean"] == [103.53, 116.28, 123.675] and presets["pixel_std"] == [1.0, 1.0, 1.0]
    backbone = ResNet(50)
    expected = {f"backbone.{key}" for key in backbone.state_dict()}
    assert set(state) == expected
    assert np.array_equal(state["backbone.layer3.5.conv2.weight"], blobs["res4_5_branch2b_w"])
    assert np.array_equal(state["backbone.layer2.0.downsample.1.bias"], blobs["res3_0_branch1_bn_b"])
    # scale and shift alone: exactly what a frozen norm with these statistics does
    assert torch.equal(state["backbone.bn1.running_var"] + 1e-5, torch.ones(64))
    assert torch.equal(state["backbone.bn1.running_mean"], torch.zeros(64))


def c4_model() -> TwoStageDetector:
    return TwoStageDetector(
        3,
        ResNet(50, stages=[4]),
        SingleLevel,
        partial(RPN, anchor_sizes=[[32, 64]]),
        partial(BoxHead, roi=RoIAlign, output_size=14, trunk=ResNetTrunk),
    )


def test_a_classifier_fills_the_backbone_and_nothing_else():
    classifier = resnet18()
    state, presets = load_foreign(classifier.state_dict(), source="torchvision")
    assert presets["channel_order"] == "rgb"
    model = tiny_model()
    model.backbone = ResNet(18)
    before = model.rpn.head.deltas.weight.clone()
    load_into(model, state)
    assert torch.equal(model.backbone.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)
    assert torch.equal(model.rpn.head.deltas.weight, before)
    with pytest.raises(ValueError, match=r"backbone\.layer1\.2\.conv1\.weight"):
        model.backbone = ResNet(34)
        load_into(model, state)


def test_the_last_stage_of_a_classifier_goes_to_the_head_of_a_c4_model():
    classifier, model = resnet50(), c4_model()
    load_into(model, load_foreign(classifier.state_dict()).state_dict)
    assert torch.equal(model.backbone.layer3[5].conv2.weight, classifier.layer3[5].conv2.weight)
    assert torch.equal(model.box_head.trunk.layer4[2].conv3.weight, classifier.layer4[2].conv3.weight)


def test_keys_that_do_not_fit_are_listed():
    model = tiny_model()
    state = model.state_dict()
    del state["rpn.head.deltas.bias"]
    state["mask_head.unknown.weight"] = torch.zeros(1)
    state["neck.lateral.0.0.bias"] = torch.zeros(7)
    with pytest.raises(ValueError) as error:
        load_into(model, state)
    for text in ("1 missing: rpn.head.deltas.bias", "1 not of this model: mask_head.unknown.weight"):
        assert text in str(error.value)
    assert "neck.lateral.0.0.bias: (7,), expected (16,)" in str(error.value)
    done = load_into(model, state, strict=False)
    assert "rpn.head.objectness_logits.bias" in done.kept and "neck.lateral.0.0.bias" in done.anew
    assert done.left == ["mask_head.unknown.weight"]


def test_heads_for_another_number_of_classes_start_anew_only_on_request():
    state = tiny_model(num_classes=5, seed=1).state_dict()
    model = tiny_model(num_classes=3)
    with pytest.raises(ValueError, match=r"box_head\.predictor\.class_logits\.weight: \(6, 32\), expected \(4, 32\)"):
        load_into(model, state)
    fresh = model.box_head.predictor.class_logits.weight.clone()
    assert "box_head.predictor.class_logits.weight" in load_into(model, state, reset_heads=True).anew
    assert torch.equal(model.box_head.predictor.class_logits.weight, fresh)
    assert torch.equal(model.box_head.trunk.fc[0].weight, state["box_head.trunk.fc.0.weight"])


def test_what_no_rule_knows_is_refused():
    with pytest.raises(ValueError, match=r"roi_heads\.strange\.weight"):
        load_foreign(
            {"proposal_generator.rpn_head.conv.bias": torch.zeros(1), "roi_heads.strange.weight": torch.zeros(1)}
        )
    with pytest.raises(ValueError, match="of none of torchvision, detectron2, mmdet"):
        load_foreign({"encoder.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="source='keras'"):
        load_foreign({}, source="keras")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_foreign("nothing.pth")


def test_class_and_anchor_order():
    rows = torch.arange(4.0)[:, None]
    key = "roi_heads.box_predictor.cls_score.weight"
    found = load_foreign({key: rows}, source="detectron2").state_dict["box_head.predictor.class_logits.weight"]
    assert found[:, 0].tolist() == [3, 0, 1, 2]  # the background, last in detectron2, comes first
    found = load_foreign({key: rows}, source="torchvision").state_dict["box_head.predictor.class_logits.weight"]
    assert found[:, 0].tolist() == [0, 1, 2, 3]
    found = load_foreign({"roi_heads.box_predictor.bbox_pred.bias": torch.arange(12.0)}, source="torchvision")
    assert found.state_dict["box_head.predictor.box_deltas.bias"].tolist() == list(range(4, 12))
    # two sizes, three ratios: detectron2 counts (size, ratio), we (ratio, size)
    anchors = {
        "proposal_generator.rpn_head.objectness_logits.bias": torch.arange(6.0),
        "proposal_generator.rpn_head.anchor_deltas.bias": torch.arange(24.0),
    }
    state = load_foreign(anchors, source="detectron2").state_dict
    assert state["rpn.head.objectness_logits.bias"].tolist() == [0, 3, 1, 4, 2, 5]
    assert state["rpn.head.deltas.bias"].view(6, 4)[:, 0].tolist() == [0, 12, 4, 16, 8, 20]


def test_convert(tmp_path, capsys):
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    arguments = ["convert", str(tmp_path / "theirs.safetensors"), str(tmp_path / "ours.pt")]
    assert main(arguments) == 2
    assert "3 classes, of unknown names" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("cat\ndog\nhorse\n")
    assert main([*arguments, "--categories", str(tmp_path / "names.txt")]) == 0
    model = detector.load(tmp_path / "ours.pt")
    assert model.categories == ["cat", "dog", "horse"]
    assert torch.equal(model.model.backbone.conv1.weight, theirs.backbone.body.conv1.weight)
    assert model.model.rpn.anchors.cells.frac().eq(0).all()  # torchvision rounds its anchors
    assert model.preprocess(np.zeros((427, 640, 3), np.uint8)).image.shape[:2] == (800, 1199)  # 1199.06; 889: 1332.6
    assert model.preprocess(np.zeros((427, 889, 3), np.uint8)).image.shape[:2] == (640, 1333)  # 640.26
    assert model.preprocess(np.zeros((600, 451, 3), np.uint8)).image.shape[:2] == (1064, 800)  # 1064.3
    model.preprocess = lambda image: type("Sample", (), {"image": image})  # at its own size: fast
    found = model.predict(np.zeros((64, 96, 3), np.uint8), threshold=0)
    assert found.boxes.shape[1] == 4
    assert isinstance(model.model, nn.Module) and not model.model.training


def test_torchvisions_first_detectors_have_no_eps(tmp_path):
    variances = {"backbone.body.bn1.running_var": torch.full((64,), 2e-5)}
    torch.save(variances, tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    state, _ = load_foreign(tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", source="torchvision")
    torch.testing.assert_close(state["backbone.bn1.running_var"] + 1e-5, torch.full((64,), 2e-5))
    state, _ = load_foreign(variances, source="torchvision")
    assert torch.equal(state["backbone.bn1.running_var"], torch.full((64,), 2e-5))


def test_the_config_in_an_mmdetection_checkpoint_decides(tmp_path):
    state = {f"backbone.{key}": value for key, value in resnet18().state_dict().items()}
    text = (
        "model=dict(backbone=dict(style='caffe'))\nimg_norm_cfg = dict(\n    mean=[1.0, 2.0, 3.0], std=[4.0, 5, 6.5], "
    )
    torch.save({"meta": {"config": text + "to_rgb=False)"}, "state_dict": state}, tmp_path / "a.pth")
    presets = load_foreign(tmp_path / "a.pth", source="mmdet").presets
    assert presets["backbone.stride_in_1x1"] is True
    assert (presets["pixel_mean"], presets["pixel_std"]) == ([1, 2, 3], [4, 5, 6.5])
    assert presets["channel_order"] == "bgr"


def test_which_backbones_see_bgr():
    def presets(width: int, style=None):
        shapes = {"conv1": (width * 32, 64, 1, 1), "conv2": (width * 32, width, 3, 3)}
        state = {f"backbone.layer1.0.{key}.weight": torch.empty(shape) for key, shape in shapes.items()}
        state |= {"backbone.bn1.weight": torch.empty(64), "backbone.bn1.running_mean": torch.empty(64)}
        return load_foreign(state, source="mmdet").presets

    assert presets(8)["channel_order"] == "bgr" and presets(8)["pixel_std"] == [57.375, 57.12, 58.395]
    assert presets(4)["channel_order"] == "rgb"
    gn = load_foreign({"backbone.gn1.weight": torch.empty(64)}, source="mmdet").presets
    assert gn["channel_order"] == "bgr" and gn["backbone.stride_in_1x1"] is False


def test_which_order_detectron2_s_buffers_are_in():
    def order(*mean: float) -> str:
        buffers = {"pixel_mean": torch.tensor(mean).view(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
        state = {"backbone.stem.conv1.weight": torch.zeros(64, 3, 7, 7)} | buffers
        presets = load_foreign(state, source="detectron2").presets
        assert presets["pixel_mean"] == pytest.approx(list(mean)) and presets["pixel_std"] == [1, 1, 1]
        return presets["channel_order"]

    assert order(103.53, 116.28, 123.675) == "bgr" and order(123.675, 116.28, 103.53) == "rgb"


def test_caffe_backbones_under_torchvisions_names(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18_msra.pth")
    assert load_foreign(tmp_path / "resnet18_msra.pth").presets["channel_order"] == "bgr"
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    assert load_foreign(tmp_path / "resnet18.pth").presets["channel_order"] == "rgb"


def test_mmdet_s_own_config_in_the_order_that_mmengine_writes():
    text = """
model = dict(
    backbone=dict(depth=50, style='caffe', type='ResNet'),
    data_preprocessor=dict(
        bgr_to_rgb=False,
        mean=[
            103.53,
            116.28,
            123.675,
        ],
        std=[
            1.0,
            1.0,
            1.0,
        ],
        type='DetDataPreprocessor'),
    rpn_head=dict(bbox_coder=dict(target_means=[0.0, 0.0, 0.0, 0.0], target_stds=[1.0, 1.0, 1.0, 1.0])))
"""
    weights = {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7)}
    presets = load_foreign({"meta": {"cfg": text}, "state_dict": weights}, source="mmdet").presets
    assert presets["channel_order"] == "bgr" and presets["backbone.stride_in_1x1"] is True
    assert presets["pixel_mean"] == [103.53, 116.28, 123.675] and presets["pixel_std"] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("mean, style", [(0.0, "caffe"), (0.1, "pytorch")])
def test_caffe_s_norms_have_no_statistics(mean, style):
    state = {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7), "neck.lateral_convs.0.conv.bias": torch.zeros(256)}
    state |= {"backbone.bn1.running_mean": torch.full((64,), mean), "rpn_head.rpn_cls.bias": torch.zeros(3)}
    assert load_foreign(state, source="mmdet").presets["backbone.stride_in_1x1"] == (style == "caffe")


def test_flattened_weights_of_the_first_fully_connected_layer_fit():
    state = tiny_model(seed=1).state_dict()
    flat = {key: value.flatten(1) if key == "box_head.trunk.fc.0.weight" else value for key, value in state.items()}
    model = tiny_model()
    load_into(model, flat)
    assert torch.equal(model.box_head.trunk.fc[0].weight, state["box_head.trunk.fc.0.weight"])


def test_other_attention_of_groie_is_refused_by_name():
    prefix = "roi_head.bbox_roi_extractor.post_module"
    state = {f"{prefix}.{key}": torch.zeros(1) for key in ("query_conv.weight", "key_conv.weight", "geom_bias")}
    with pytest.raises(ValueError, match=rf"2 keys have no place .*: {prefix}.key_conv.weight, {prefix}.geom_bias"):
        load_foreign(state, source="mmdet")
