"""Every model, backbone and neck of configs/ builds as published and, in small, trains a step and detects."""

from __future__ import annotations

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import detection, resnet18, resnet34, resnet101

from detector.config import CONFIGS, build, check
from detector.model import TwoStageDetector
from detector.structures import Batch, Detections, Targets
from tests.tiny import all_rows, small_swins

GROUPS = ("model", "backbone", "neck")
NAMES = {group: sorted(file.stem for file in (CONFIGS / group).glob("*.yaml")) for group in GROUPS}
# A backbone or neck that needs another model than Faster R-CNN with FPN.
MODEL_FOR = {"resnet50_c4": "faster_rcnn_c4", "resnet50_dc5": "faster_rcnn_dc5", "single": "faster_rcnn_dc5"}
VIT = ["backbone@model.backbone=vit", "neck@model.neck=simple_pyramid"]
TIMM = {
    "timm": ["model.backbone.name=resnet18"],
    **{name: [] for name in ("convnext_tiny", "swin", "swin_tiny")},
    **{name: [] for name in ("mask_rcnn_vitdet", "cascade_mask_rcnn_vitdet", "cascade_swin")},
    **{"vit": VIT, "simple_pyramid": VIT},
}
SMALL = {  # keys that are made small where a config has them
    "backbone.width": 32,
    "neck.out_channels": 32,
    "rpn.conv_channels": [32],
    "rpn.pre_nms_top_n": [100, 100],
    "rpn.post_nms_top_n": [50, 50],
    "box_head.trunk.fc_channels": [32],
    "box_head.batch_size_per_image": 16,
    "box_head.detections_per_image": 5,
    "mask_head.upsample_channels": 32,
    "mask_head.trunk.conv_channels": [32],
    "keypoint_head.trunk.conv_channels": [32],
    "mask_head.score_channels": [16, 16],
    "mask_head.score_fc": [32],
    "mask_head.fc_channels": [32],
    "mask_head.point_channels": [16],
    "mask_head.subdivisions": 3,
    "extra_heads.attributes.trunk.fc_channels": [32],
    "extra_heads.attributes.attributes": [["old"], ["color", "blue", "red"]],
}
LOSSES = {  # beside the usual ones
    "mask_scoring_rcnn": {"loss_mask_iou"},
    "pointrend_rcnn": {"loss_mask", "loss_point"},
    "htc": {"loss_mask"},
    "cascade_swin": {"loss_mask"},
    "attribute_rcnn": {"loss_attributes"},
}


def config(*overrides: str):
    """The checked model config of a composition."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["experiment=none", *overrides])
    check(cfg)
    return cfg.model


def choose(group: str, name: str) -> list[str]:
    if group == "model":
        return [f"model={name}"]
    return [f"model={MODEL_FOR.get(name, 'faster_rcnn')}", f"{group}@model.{group}={name}", *TIMM.get(name, [])]


def small(cfg):
    OmegaConf.set_struct(cfg, False)
    if "ResNet" not in cfg.backbone._target_:
        cfg.backbone.drop_path_rate = 0.0
    if "ViT" in cfg.backbone._target_:
        cfg.backbone.name, cfg.backbone.depth = "test_vit", 4
    for path, value in SMALL.items():
        parent, _, key = path.rpartition(".")
        node = OmegaConf.select(cfg, parent)
        if node is None or (path == "backbone.width" and "ResNet" not in cfg.backbone._target_):
            continue
        if key in node or path in ("backbone.width", "rpn.conv_channels"):
            OmegaConf.update(cfg, path, value)
    return cfg


def random_input(keypoints: int = 17) -> tuple[Batch, Targets]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[96, 128], [80, 128]])
    boxes = torch.tensor([[[8.0, 8, 60, 70], [50, 20, 120, 76]], [[20, 30, 90, 78], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    points = boxes[:, :, None, :2] + torch.rand(2, 2, keypoints, 2, generator=generator) * 40
    visible = torch.full((2, 2, keypoints, 1), 2.0) * valid[:, :, None, None]
    targets = Targets(
        boxes,
        labels=torch.tensor([[1, 2], [3, 0]]),
        valid=valid,
        crowd=torch.zeros_like(valid),
        masks=torch.randint(0, 2, (2, 2, 28, 28), dtype=torch.uint8, generator=generator),
        mask_windows=boxes + torch.tensor([0.0, 0, 1e-3, 1e-3]),
        has_mask=valid,
        keypoints=torch.cat([points, visible], dim=-1),
        attributes=torch.tensor([[[1, 0], [-1, 1]], [[0, -1], [0, 0]]]),
    )
    return Batch(images, sizes, sizes, torch.arange(2), torch.arange(2)), targets


def half_empty_input() -> tuple[Batch, Targets]:
    """`random_input`, but for the first image, which has no objects."""
    batch, targets = random_input()
    keep = torch.tensor([False, True])
    return batch, Targets(*(t * keep.view(-1, *[1] * (t.dim() - 1)) for t in targets))


def untrained(group: str, name: str, monkeypatch) -> TwoStageDetector:
    """The named part in a small model of three classes with random weights."""
    if name in TIMM:
        pytest.importorskip("timm")
    if "swin" in name:
        small_swins(monkeypatch)
    torch.manual_seed(0)
    model = build(small(config(*choose(group, name))), "model", num_classes=3)
    with torch.no_grad():
        for key, value in model.backbone.state_dict().items():
            if key.endswith("bn3.weight"):
                value.fill_(0.1)  # or untrained residual blocks add up to infinity
    return model


def assert_learns(model: TwoStageDetector, losses: dict[str, torch.Tensor]) -> None:
    """The losses and their gradients are finite, and every parameter has one."""
    sum(losses.values()).backward()
    for key, value in losses.items():
        assert value.isfinite(), key
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def detections(model: TwoStageDetector, batch: Batch) -> Detections:
    """What it finds, however unsure it is."""
    for head in model.box_head.modules() if model.box_head else ():
        if hasattr(head, "score_threshold"):
            head.score_threshold = -1.0
    with torch.no_grad():
        return model.eval()(batch)


ALL = [(group, name) for group, names in NAMES.items() for name in names]


@pytest.mark.parametrize("group, name", ALL)
def test_a_training_step_and_an_inference(group, name, monkeypatch):
    model = untrained(group, name, monkeypatch)
    batch, targets = random_input()
    losses = model.train()(batch, targets)
    assert_learns(model, losses)
    expected = {"loss_objectness", "loss_rpn_box_reg"}
    expected |= set() if name == "rpn" else {"loss_classifier", "loss_box_reg"}
    expected |= {"loss_mask"} if "mask" in name else {"loss_keypoint"} if "keypoint" in name else set()
    assert set(losses) == expected | LOSSES.get(name, set())
    found = detections(model, batch)
    assert found.valid.any(dim=1).all()
    assert (found.boxes[1] <= torch.tensor([128.0, 80, 128, 80])).all()
    assert (found.masks is not None) == ("loss_mask" in losses)
    assert (found.keypoints is not None) == ("keypoint" in name)


@pytest.mark.parametrize("name", NAMES["model"])
def test_rows_of_padding_change_nothing(name, monkeypatch):
    """On a GPU they stay among the RoIs; nor does an image without objects, whose padding has nothing to look for."""
    model = untrained("model", name, monkeypatch).train()
    batch, targets = half_empty_input()
    monkeypatch.setattr("torch.rand", lambda *size, device=None: torch.full(size, 0.3))  # PointRend draws for each row
    state = {key: value.clone() for key, value in model.state_dict().items()}
    losses = model(batch, targets)
    learnt = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    monkeypatch.setattr("detector.heads.box.flatten_valid", all_rows)
    padded = model(batch, targets)
    assert_learns(model, padded)
    for key, value in losses.items():
        torch.testing.assert_close(padded[key], value, rtol=1e-4, atol=1e-6)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, learnt[key], rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.slow  # where a processor has no instructions for it
@pytest.mark.parametrize("group, name", ALL)
def test_bf16(group, name, monkeypatch):
    model = untrained(group, name, monkeypatch)
    batch, targets = random_input()
    with torch.autocast("cpu", torch.bfloat16):
        assert_learns(model, model.train()(batch, targets))
        found = detections(model, batch)
    assert found.valid.any(dim=1).all() and found.boxes.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES["model"] if name != "rpn"])
def test_position_sensitive_methods_fit_every_model(name):
    """Each head makes the maps that they read of features whose channels are no multiple of the bins."""
    with torch.device("meta"):
        model = build(config(f"model={name}", "roi=position_sensitive_align"), "model", num_classes=3)
    layers = {key: p for key, p in model.named_parameters() if key.endswith(".op.maps.weight")}
    heads = {part for part, _ in model.named_children() if part.endswith("_head")}
    assert {key.partition(".")[0] for key in layers} == heads | ({"extra_heads"} if model.extra_heads else set())
    assert {layer.shape[:2] for layer in layers.values()} == {(490, model.neck.out_channels)}


@pytest.mark.parametrize(
    "roi", ["position_sensitive_align", "position_sensitive_pool", "deformable_position_sensitive"]
)
def test_position_sensitive_methods_train(roi):
    model = build(small(config("model=mask_rcnn", f"roi={roi}")), "model", num_classes=3)
    losses = model.train()(*random_input())
    sum(losses.values()).backward()
    grads = [p.grad for key, p in model.named_parameters() if ".op.maps." in key]
    assert len(grads) == 4 and all(grad.isfinite().all() and grad.any() for grad in grads)
    assert ("loss_offset" in losses) == (roi == "deformable_position_sensitive")


def count(cfg, num_classes: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(cfg, "model", num_classes=num_classes).parameters())


def theirs(builder, num_classes: int) -> int:
    """Parameters of a torchvision detector without the boxes and masks that it predicts for the background."""
    with torch.device("meta"):
        model = builder(weights=None, weights_backbone=None, num_classes=num_classes + 1)
    total = sum(p.numel() for p in model.parameters())
    total -= 4 * (model.roi_heads.box_predictor.bbox_pred.in_features + 1)
    if model.roi_heads.has_mask():
        total -= model.roi_heads.mask_predictor.mask_fcn_logits.in_channels + 1
    return total


@pytest.mark.parametrize(
    "builder, overrides",
    [
        ("fasterrcnn_resnet50_fpn", ["model=faster_rcnn"]),
        ("maskrcnn_resnet50_fpn", ["model=mask_rcnn"]),
        ("fasterrcnn_resnet50_fpn_v2", ["model=faster_rcnn_v2"]),
        ("maskrcnn_resnet50_fpn_v2", ["model=mask_rcnn_v2"]),
    ],
)
def test_as_many_parameters_as_torchvisions(builder, overrides):
    norms = 0 if builder.endswith("v2") else 53_120  # v1's are frozen, in torchvision only when weights are loaded
    assert count(config(*overrides), 80) == theirs(getattr(detection, builder), 80) - norms


@pytest.mark.parametrize(
    "overrides, parameters",
    [  # of detectron2 and mmdetection, 80 classes (keypoints: 1)
        (["model=faster_rcnn"], 41_699_936),
        (["model=mask_rcnn"], 44_343_216),
        (["model=mask_rcnn", "backbone@model.backbone=resnet101"], 63_283_120),
        (["model=faster_rcnn", "backbone@model.backbone=resnext101_32x8d"], 104_784_480),
        (["model=faster_rcnn_c4"], 33_791_644),
        (["model=mask_rcnn_c4"], 35_909_612),
        (["model=faster_rcnn_dc5"], 165_581_468),
        (["model=mask_rcnn_dc5"], 172_353_516),
        (["model=mask_rcnn", "backbone@model.backbone=resnet50_dconv"], 44_924_058),
        (["model=mask_rcnn_gn"], 45_711_152),
        (["model=rpn"], 27_393_231),
        (["model=cascade_mask_rcnn"], 71_984_926),
        (["model=cascade_mask_rcnn_per_stage"], 77_271_486),
        (["model=htc"], 77_271_486 + 2 * (256 * 256 + 256)),
        (["model=faster_rcnn", "neck@model.neck=pafpn"], 45_240_416),
        (["model=keypoint_rcnn"], 59_133_158),
        (["model=mask_scoring_rcnn"], 44_343_216 + 257 * 256 * 9 + 3 * 256 * 256 * 9 + 4 * 256 + 13_977_680),
    ],
)
def test_as_many_parameters_as_published(overrides, parameters):
    assert count(config(*overrides), 1 if "keypoint" in overrides[0] else 80) == parameters


def test_backbones_have_torchvisions_parameters():
    for name, builder in (("resnet18", resnet18), ("resnet34", resnet34), ("resnet101", resnet101)):
        with torch.device("meta"):
            wanted = builder(num_classes=1).state_dict()
            found = build(
                config("model=faster_rcnn", f"backbone@model.backbone={name}"), "model", num_classes=2
            ).backbone.state_dict()
        wanted = {k: v.shape for k, v in wanted.items() if not k.startswith("fc.") and "num_batches" not in k}
        assert {k: v.shape for k, v in found.items()} == wanted


@pytest.mark.parametrize("version", ["", "_v2"])
def test_as_many_flops_as_torchvisions(version):
    """Of Mask R-CNN on 800 x 1216 px, 1000 proposals and 100 masks, network parts by network parts."""
    cfg = config(f"model=mask_rcnn{version}")
    cfg.num_classes = 90
    with torch.device("meta"):
        ours = build(cfg, "model").eval()
        other = getattr(detection, f"maskrcnn_resnet50_fpn{version}")(weights=None, weights_backbone=None).eval()
        images, boxes, masks = torch.empty(1, 3, 800, 1216), torch.empty(1000, 256, 7, 7), torch.empty(100, 256, 14, 14)

        def flops(run) -> int:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                run()
            return counter.get_total_flops()

        heads = other.roi_heads
        assert flops(lambda: ours.rpn.head(ours.neck(ours.backbone(images)))) == flops(
            lambda: other.rpn.head(list(other.backbone(images).values()))
        )
        background = 2 * 1000 * 4 * heads.box_predictor.bbox_pred.in_features  # boxes that torchvision gives it
        assert flops(lambda: ours.box_head.predictor(ours.box_head.trunk(boxes))) == (
            flops(lambda: heads.box_predictor(heads.box_head(boxes))) - background
        )
        # torchvision makes the masks of all classes, the background included
        others = 2 * 100 * 28 * 28 * heads.mask_predictor.mask_fcn_logits.in_channels * 90
        labels = torch.ones(100, dtype=torch.long)
        assert flops(lambda: ours.mask_head.predictor(ours.mask_head.trunk(masks), labels)) == (
            flops(lambda: heads.mask_predictor(heads.mask_head(masks))) - others
        )
