"""What leaves the framework finds what the model in it finds."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch.export import Dim

import detector
from detector import checkpoint as checkpoints
from detector.backbone import FPN, PAFPN, BiFPN, ResNet, SimplePyramid, SingleLevel, ViT
from detector.backbone.resnet import DeformConv2d
from detector.commands.weights import main
from detector.config import ConfigError, build, compose
from detector.export.export import Exportable, export, export_program, output_names, save_onnx
from detector.export.export import survivors as fixed_survivors
from detector.heads import (
    BoxHead,
    CascadeBoxHead,
    CascadeMaskHead,
    ConvTrunk,
    FCTrunk,
    KeypointHead,
    MaskHead,
    MaskScoringHead,
    ResNetTrunk,
)
from detector.model import TwoStageDetector
from detector.ops.boxes import nms_by_image, survivors
from detector.roi import (
    DeformableRoIPool,
    GRoIE,
    PositionSensitiveRoIAlign,
    PositionSensitiveRoIPool,
    PreciseRoIPool,
    RoIAlign,
    RoIExtractor,
    RoIPool,
)
from detector.roi.base import make_op
from detector.rpn import RPN
from detector.runtime import autocast
from detector.structures import Batch
from tests.tiny import random_batch, tiny_model
from tests.untrained import SMALL

SIZE = (96, 128)
CASES = [(SIZE, (90, 120)), ((128, 96), (128, 96)), ((96, 160), (40, 50)), ((160, 224), (33, 70))]  # canvas, content
BOX = {"score_threshold": 0.28, "detections_per_image": 20}
STAGES = {"coder_weights": [[10, 10, 5, 5], [20, 20, 10, 10]], "positive_iou": [0.5, 0.6], "stage_weights": [1.0, 0.5]}
RPN_TOP = {"pre_nms_top_n": (200, 100), "post_nms_top_n": (100, 50)}


def small_model(**settings):
    return lively(tiny_model(rpn=RPN_TOP, box_head=BOX | settings))


def lively(model):
    """In evaluation mode, with random predictors that differ from row to row, so that something is found."""
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("class_logits.weight", "offset_predictor", "keypoint_head.predictor")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def two_levels(stages=(2, 3), neck=None, box=None, top=None, heads=None, backbone=None, **settings):
    """A model that exports in seconds: two levels, or what `stages` and `neck` make of them. `heads`: further ones."""
    torch.manual_seed(1)
    common = {"canonical_level": 3, "canonical_size": 32}
    box = {"roi": RoIAlign, "trunk": partial(FCTrunk, fc_channels=[32])} | common | BOX | (box or {})
    box_head = settings.pop("box_head", BoxHead)
    model = TwoStageDetector(
        3,
        backbone or ResNet(10, width=8, norm="batch_norm", frozen_stages=0, stages=stages),
        neck or partial(FPN, out_channels=16, top="none"),
        partial(RPN, anchor_sizes=[[24]], **RPN_TOP | (top or {})),
        box_head and partial(box_head, **box),
        **{name: partial(head, **common, **options) for name, (head, options) in (heads or {}).items()},
        **settings,
    )
    return lively(model)


def mask_head(kind=MaskHead, **settings):
    trunk = partial(ConvTrunk, conv_channels=[16])
    return {"mask_head": (kind, {"roi": RoIAlign, "trunk": trunk, "upsample_channels": 16} | settings)}


def c4():
    """One level; stage 5 on the RoIs, which box and mask head share."""
    trunk = partial(ResNetTrunk, norm="batch_norm", blocks=1, width_per_group=32)
    heads = {"mask_head": (MaskHead, {"roi": RoIAlign, "upsample_channels": 16})}
    return two_levels((3,), SingleLevel, {"trunk": trunk}, heads=heads, share_trunk=True)


def everything():
    """A cascade of agnostic boxes, masks and keypoints on a PAFPN with frozen norms."""
    trunk = partial(ConvTrunk, conv_channels=[16])
    keypoints = {"keypoint_head": (KeypointHead, {"roi": RoIAlign, "num_keypoints": 2, "trunk": trunk})}
    return two_levels(
        neck=partial(PAFPN, out_channels=16, norm="plain_frozen_batch_norm"),
        box={"nms_agnostic": True, "min_size_last": True, "nms": "mmcv", "detections_per_image": 4} | STAGES,
        box_head=CascadeBoxHead,
        top={"rank_by": "probability"},
        heads=mask_head(CascadeMaskHead, stage_weights=[1.0, 0.5]) | keypoints,  # resized object by object
    )


def mask_scores():
    return two_levels(heads=mask_head(MaskScoringHead, score_channels=[8], score_fc=[8]))


MODELS = {"everything": everything, "c4": c4, "proposals": lambda: two_levels(box_head=None), "scores": mask_scores}
ROIS = {
    "align_adaptive": partial(RoIAlign, sampling_ratio=0),
    "align_max": partial(RoIAlign, reduction="max", placement="edge"),
    "pool": RoIPool,
    "deformable": partial(
        DeformableRoIPool, predictor_width=8, sampling_ratio=0, modulated=True, predictor="per_level"
    ),
    "deformable_points": partial(DeformableRoIPool, predictor_width=8, modulated=True, offset_granularity="point"),
    "groie": GRoIE,
    "precise": PreciseRoIPool,
    "position_sensitive_align": PositionSensitiveRoIAlign,
    "position_sensitive_pool": PositionSensitiveRoIPool,
}


@torch.no_grad()
def same_detections(model, run, canvas, size, seed=0, atol=(1e-3, 1e-5, 1e-4, 1e-2), divisor=32):
    """Run `run(images, image_size)` on a canvas and compare boxes, scores, masks, keypoints with what the model finds
    in the content of `size` alone; returns the count of detections."""
    batch, _ = random_batch(images=1, size=canvas, seed=seed)
    height, width = (-(-side // divisor) * divisor for side in size)
    size = torch.tensor([size])
    expected = model(batch._replace(image_sizes=size, images=batch.images[:, :, :height, :width]))
    found = dict(zip(output_names(model), map(torch.as_tensor, run(batch.images, size[0])), strict=True))
    there = expected.valid[0]
    assert (found["labels"] > 0).tolist() == there.tolist()
    assert found["labels"][there].tolist() == expected.labels[0, there].tolist()
    for name, tolerance in zip(("boxes", "scores", "masks", "keypoints"), atol):
        if name in found:
            wanted = getattr(expected, name)[0]
            torch.testing.assert_close(found[name][there], wanted[there], atol=tolerance, rtol=0)
            if name in ("boxes", "scores"):
                assert not found[name][~there].any()
    return int(there.sum())


def reloaded(program, tmp_path):
    torch.export.save(program, tmp_path / "model.pt2")
    return torch.export.load(tmp_path / "model.pt2").module()


def onnx_session(model, program, path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"the extra 'export' is not installed: no {name}")
    runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed: no onnxruntime")
    save_onnx(program, output_names(model), path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert [node.name for node in session.get_outputs()] == output_names(model)
    return lambda images, size: session.run(None, inputs_of(images, size))


def test_the_exportable_path_is_the_models():
    model = small_model()
    assert min(same_detections(model, Exportable(model), *case) for case in CASES) > 0
    nothing = small_model(score_threshold=0.999)
    assert same_detections(nothing, Exportable(nothing), *CASES[0]) == 0
    large = small_model(min_size=30.0, min_size_last=True, nms_agnostic=True)
    assert same_detections(large, Exportable(large), *CASES[1]) > 0


def test_masks_scores_go_along():
    model = mask_scores()
    batch, _ = random_batch(images=1, size=(96, 128))
    with torch.no_grad():
        expected, outputs = model(batch), Exportable(model)(batch.images, batch.image_sizes[0])
        found = dict(zip(output_names(model), outputs, strict=True))
    assert [*found] == ["boxes", "scores", "labels", "masks", "mask_score"] and expected.valid.any()
    there = expected.valid[0]
    torch.testing.assert_close(found["mask_score"][there], expected.extra["mask_score"][0, there], atol=1e-5, rtol=0)


def test_a_first_entry_that_is_not_finite_harms_nobody():
    """Padding points at it, and NMS compares all boxes with each other."""
    boxes = torch.tensor([[[torch.nan] * 4, [0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60]]])
    scores, group = torch.tensor([[torch.nan, 0.5, 0.9, 0.7]]), torch.tensor([[0, 0, 0, 1]])
    args = (boxes[..., 0] >= 0, torch.zeros(1, dtype=torch.long), group, nms_by_image, 0.5, 1, 4)
    found, expected = fixed_survivors(boxes, scores, *args), survivors(boxes, scores, *args)
    assert found.valid.tolist() == expected.valid.tolist() == [[True, True, False, False]]
    assert torch.equal(found.of(boxes), expected.of(boxes)) and torch.equal(found.scores, expected.scores)


@pytest.mark.slow
def test_one_program_serves_every_size(tmp_path):
    model = two_levels(neck=partial(FPN, out_channels=16), heads=mask_head())  # and a third one, for the RPN
    program = export_program(model)
    for run in (reloaded(program, tmp_path), onnx_session(model, program, tmp_path / "model.onnx")):
        assert min(same_detections(model, run, *case) for case in [*CASES, ((32, 64), (30, 64))]) > 0
    with pytest.raises(RuntimeError):  # an image that is larger than its canvas
        reloaded(program, tmp_path)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([65, 64]))


class Maps(torch.nn.Module):
    """Backbone and neck alone, as `Exportable` runs them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, image_size):
        sizes, none = image_size[None], torch.zeros(1, dtype=torch.int64)
        return tuple(self.model.features(Batch(images, sizes, sizes, none, none)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "bifpn"])
def test_backbone_and_neck_serve_every_size(name, tmp_path):
    """A ViT whose windows seldom divide the map, with one global block and tables for a larger map; BiFPN."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed: no onnxruntime")
    neck, body = partial(BiFPN, out_channels=16, repeats=1, top="none"), None
    if name == "vit":
        pytest.importorskip("timm")
        body = ViT("test_vit", depth=2, window=3, global_blocks=[1], tokens=False, relative_positions=160)
        neck = partial(SimplePyramid, out_channels=16, levels=[16, 32], top="none")
    maps = Maps(two_levels(backbone=body, neck=neck, box_head=None)).requires_grad_(False)
    batch = random_batch(images=1, size=(160, 192))[0]
    sides = {2: 32 * Dim("rows", min=1), 3: 32 * Dim("columns", min=1)}
    program = torch.export.export(maps, (batch.images, torch.tensor([150, 190])), dynamic_shapes=(sides, {}))
    save_onnx(program, ["fine", "coarse"], tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    for canvas, content in [*CASES, ((96, 96), (96, 90))]:  # which the windows divide
        images, size = random_batch(images=1, size=canvas)[0].images, torch.tensor(content)
        expected = maps(images, size)
        for run in (program.module(), lambda *both: session.run(None, inputs_of(*both))):
            for level, wanted in zip(run(images, size), expected, strict=True):
                torch.testing.assert_close(torch.as_tensor(level), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.*create_unbacked_symint:FutureWarning")  # users get no warnings of libraries
@pytest.mark.parametrize("name", MODELS)
def test_models(name, tmp_path):
    model = MODELS[name]()
    program = export_program(model, SIZE)
    runs = [reloaded(program, tmp_path)]
    if name == "everything":  # the others have no operator of their own
        runs.append(onnx_session(model, program, tmp_path / "model.onnx"))
    for run in runs:
        assert min(same_detections(model, run, SIZE, content) for content in ((90, 120), (96, 60), (31, 64))) > 0


class OnTwoLevels(torch.nn.Module):
    """A RoI method alone: a map and the one of half its size, and RoIs in the place of the image's size."""

    def __init__(self, roi, channels):
        super().__init__()
        op = make_op(roi, 3, channels=channels, levels=2)
        self.extractor = RoIExtractor(op, (4, 8), canonical_level=3, canonical_size=32)

    def forward(self, images, rois):
        return (self.extractor([images, torch.nn.functional.avg_pool2d(images, 2)], rois).features,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROIS)
def test_roi_methods(name, tmp_path):
    """Of each kind of operator one; tests/roi/test_plain.py compares all methods, test_models has whole models."""
    torch.manual_seed(0)
    method = lively(OnTwoLevels(ROIS[name], channels=18))
    maps = torch.rand(1, 18, 24, 32)
    rois = torch.tensor([[0, 3, 5, 60.5, 70], [0, 10, 10, 25, 31], [0, -9, 40, 90, 200], [0, 100, 80, 128, 96.0]])
    with torch.no_grad():
        expected = method(maps, rois)[0]
        program = torch.export.export(method, (maps, rois.flip(0) / 2))
        save_onnx(program, ["features"], tmp_path / "model.onnx")
        runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed: no onnxruntime")
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        for run in (reloaded(program, tmp_path), lambda *both: session.run(None, inputs_of(*both))):
            torch.testing.assert_close(torch.as_tensor(run(maps, rois)[0]), expected, atol=1e-4, rtol=1e-4)


def inputs_of(images, size):
    return {"images": images.numpy(), "image_size": size.numpy()}


@pytest.mark.slow
def test_canvas_of_an_imported_model(tmp_path):
    """It pads content to a multiple of size_divisibility, whatever the canvas."""
    model = two_levels(size_divisibility=1, neck=SingleLevel, stages=(3,))
    try:
        program = export_program(model)
    except ValueError as error:
        assert "makes no program of this model for every size: fix one" in str(error)  # torch 2.11
        program = export_program(model, (75, 98))
    run = reloaded(program, tmp_path)
    assert same_detections(model, run, (75, 98), (75, 98), divisor=1) > 1
    assert same_detections(model, run, (75, 98), (66, 71), divisor=1) > 1
    with pytest.raises(ValueError, match="multiples of 48"):
        export_program(two_levels(size_divisibility=48), (96, 128))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_program(precision, tmp_path):
    model = two_levels((3,), SingleLevel, heads=mask_head())
    program = export_program(model, SIZE, precision)
    run = reloaded(program, tmp_path)

    def autocasted(batch):
        with autocast(torch.device("cpu"), precision):
            return model(batch)

    autocasted.mask_head, autocasted.keypoint_head = model.mask_head, None
    assert same_detections(autocasted, run, *CASES[0], atol=(1e-2, 1e-4, 1e-3)) > 1
    if precision == "bf16":
        with pytest.raises(ValueError, match="take no bf16: export with precision fp16"):
            save_onnx(program, output_names(model), tmp_path / "model.onnx")
    else:
        run = onnx_session(model, program, tmp_path / "model.onnx")
        images = random_batch(images=1, size=SIZE)[0].images
        boxes, scores, _, masks = run(images, torch.tensor(SIZE))
        expected = model(random_batch(images=1, size=SIZE)[0])
        assert boxes.dtype == scores.dtype == masks.dtype == np.float32
        assert 0 < np.median(np.abs(scores - expected.scores[0].numpy())) < 1e-3  # NMS may let another box win
        onnx = pytest.importorskip("onnx")
        weights = [t for t in onnx.load(tmp_path / "model.onnx").graph.initializer if len(t.dims) > 1]
        halves = sum(np.prod(t.dims) for t in weights if t.data_type == onnx.TensorProto.FLOAT16)
        assert halves > 0.8 * sum(np.prod(t.dims) for t in weights)


@pytest.mark.slow
def test_what_onnx_lacks_is_named(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra 'export' is not installed: no onnxscript")
    model = two_levels()
    model.backbone.layer1[0].conv2 = DeformConv2d(model.backbone.layer1[0].conv2)
    program = export_program(lively(model), SIZE)
    assert same_detections(model, reloaded(program, tmp_path), *CASES[0]) > 0
    with pytest.raises(ValueError, match=r"no form of torchvision.deform_conv2d.*name it \.pt2"):
        save_onnx(program, output_names(model), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roi": partial(RoIAlign, sampling_ratio=0, reduction="max")}, "mask_head.roi is RoIAlign.*follows the RoI's"),
        ({"box_head": {"nms": "linear"}}, "box_head.nms is 'linear'"),
    ],
)
def test_what_cannot_be_exported_is_named(settings, message):
    with pytest.raises(ValueError, match=f"cannot be exported: .*{message}"):
        Exportable(tiny_model(**settings))


def test_arguments_are_checked(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="multiples of 32"):
        export_program(model, (100, 128))
    with pytest.raises(ValueError, match="precision is 'int8', expected one of fp32, bf16, fp16"):
        export_program(model, SIZE, "int8")
    with pytest.raises(ValueError, match=r"must end in \.safetensors, \.pt2 or \.onnx"):
        export("a.pt", tmp_path / "a.bin")
    with pytest.raises(TypeError, match="model is a Linear, not a TwoStageDetector"):
        Exportable(torch.nn.Linear(1, 1))


# ------------------------------------------------------------------------------------------------------- safetensors


@pytest.fixture(scope="module")
def state():
    """A checkpoint as training writes it."""
    cfg = compose("train", [*(s for s in SMALL if not s.startswith("model/backbone")), "data.root=none"])
    config = OmegaConf.to_container(OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"]), resolve=True)
    torch.manual_seed(0)
    model = build(config["model"], "model", num_classes=2)
    names = {"categories": ["cat", "dog"], "category_ids": [3, 9]}
    return {"model": model.state_dict(), "ema": None, "config": config, "iteration": 1, **names}


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (90, 128, 3), np.uint8)


def test_safetensors_hold_all_that_inference_needs(state, image, tmp_path, capsys):
    averaged = {k: v * 1.1 if v.is_floating_point() else v for k, v in state["model"].items()}
    checkpoints.save(state | {"ema": averaged}, tmp_path / "run.pt")
    assert main(["export", str(tmp_path / "run.pt"), str(tmp_path / "out.safetensors")]) == 0
    before, after = detector.load(tmp_path / "run.pt"), detector.load(tmp_path / "out.safetensors")
    assert after.categories == ["cat", "dog"] and after.category_ids == [3, 9] and after.config == before.config
    expected, found = before.predict(image, 0), after.predict(image, 0)
    assert len(expected.boxes) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, found) if a is not None)
    assert main(["export", str(tmp_path / "missing.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert "there is no such checkpoint" in capsys.readouterr().err


def test_other_safetensors_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="without the config of a detector"):
        detector.load(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-4])
    with pytest.raises(ConfigError, match="cut short or of another format"):
        detector.load(tmp_path / "cut.safetensors")
    with pytest.raises(ConfigError, match="no such file"):
        detector.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_finds_nearly_the_same(state, image, precision):
    model = detector.load(state)
    expected, found = model.predict(image, 0), model.predict(image, 0, precision=precision)
    assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert not torch.equal(expected.scores, found.scores)  # it did run in half precision
    torch.testing.assert_close(found.scores, expected.scores, atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="precision is 'int8'"):
        model.predict(image, precision="int8")
