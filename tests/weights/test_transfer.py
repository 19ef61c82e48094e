"""From one model to a related one: what fits is kept to the bit, classes by name; the rest is said, or refused."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import detector
from detector import checkpoint as checkpoints
from detector.commands.weights import main
from detector.config import ConfigError, build
from detector.heads import CascadeBoxHead, FCTrunk
from detector.roi import DeformableRoIPool, RoIAlign
from detector.weights import load_into
from detector.weights.categories import COCO_91, COCO_IDS
from detector.weights.loading import read_foreign
from tests.tiny import OVERRIDES, tiny_model
from tests.weights.test_start import composed

COCO = [COCO_91[i] for i in COCO_IDS]
THREE = ["dog", "helmet", "person"]  # two of them COCO's, in another order
OURS = ("class_logits.weight", "class_logits.bias", "box_deltas.weight", "box_deltas.bias")
BOXES = [f"box_head.predictor.{key}" for key in OURS]
MASKS = ["mask_head.predictor.mask_logits.weight", "mask_head.predictor.mask_logits.bias"]


def rows(state: dict[str, Tensor], names: list[str], name: str) -> list[Tensor]:
    """What the predictors of a model of ours know of a class, the background's row first."""
    i = names.index(name)
    logits, bias, deltas, bias_of_deltas = (state[key] for key in BOXES)
    found = [
        logits[0],
        bias[0],
        logits[i + 1],
        bias[i + 1],
        deltas[4 * i : 4 * i + 4],
        bias_of_deltas[4 * i : 4 * i + 4],
    ]
    return found + [state[key][i] for key in MASKS]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def of_torchvision() -> tuple[dict[str, Tensor], list[int]]:
    """Predictors of 91 classes in torchvision's layout, and the row of each COCO class among the logits."""
    state = {
        "rpn.head.cls_logits.bias": torch.randn(3),
        "roi_heads.box_predictor.cls_score.weight": torch.randn(91, 32),
        "roi_heads.box_predictor.cls_score.bias": torch.randn(91),
        "roi_heads.box_predictor.bbox_pred.weight": torch.randn(364, 32),
        "roi_heads.box_predictor.bbox_pred.bias": torch.randn(364),
        "roi_heads.mask_predictor.mask_fcn_logits.weight": torch.randn(91, 16, 1, 1),
        "roi_heads.mask_predictor.mask_fcn_logits.bias": torch.randn(91),
    }
    return state, COCO_IDS


def of_others(logits: str, deltas: str, masks: str, rpn: str) -> tuple[dict[str, Tensor], list[int]]:
    """The same of detectron2 or mmdetection: 80 classes, the background last."""
    state = {rpn: torch.randn(3)}
    for kind in ("weight", "bias"):
        state[f"{logits}.{kind}"] = torch.randn(81, *[32][: kind == "weight"])
        state[f"{deltas}.{kind}"] = torch.randn(320, *[32][: kind == "weight"])
        state[f"{masks}.{kind}"] = torch.randn(80, *[16, 1, 1][: 3 * (kind == "weight")])
    return state, list(range(80))


FRAMEWORKS = {
    "torchvision": of_torchvision,
    "detectron2": partial(
        of_others,
        *("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred", "roi_heads.mask_head.predictor"),
        "proposal_generator.rpn_head.objectness_logits.bias",
    ),
    "mmdet": partial(
        of_others,
        *("roi_head.bbox_head.fc_cls", "roi_head.bbox_head.fc_reg", "roi_head.mask_head.conv_logits"),
        "rpn_head.rpn_cls.bias",
    ),
}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_classes_of_coco_are_found_by_name(framework):
    torch.manual_seed(0)
    theirs, places = FRAMEWORKS[framework]()
    weights, source, names, _ = read_foreign(theirs)
    assert source == framework
    model = tiny_model(num_classes=3)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    done = load_into(model, weights.state_dict, strict=False, theirs=names, ours=THREE)
    state, keys = model.state_dict(), list(theirs)[1:]
    if framework == "torchvision":
        logits, bias, deltas, deltas_bias, masks, masks_bias = (theirs[key] for key in keys)
    else:
        logits, deltas, masks, bias, deltas_bias, masks_bias = (theirs[key] for key in keys)
    box, background = (lambda i: slice(4 * i, 4 * i + 4)), 0 if framework == "torchvision" else 80
    for name in ("dog", "person"):
        i = places[COCO.index(name)]
        expected = [logits[background], bias[background], logits[i], bias[i], deltas[box(i)], deltas_bias[box(i)]]
        assert same(rows(state, THREE, name), [*expected, masks[i], masks_bias[i]])
    assert same(rows(state, THREE, "helmet")[2:], rows(fresh, THREE, "helmet")[2:])
    assert {*done.rows} == {*BOXES, *MASKS}
    assert "2 kept: dog, person; 1 new: helmet; 78 left: bicycle, " in str(done)


def test_classes_are_found_in_the_other_direction_and_in_any_order():
    ours = tiny_model(num_classes=3, seed=1).state_dict()
    model = tiny_model(num_classes=80)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    load_into(model, ours, reset_heads=True, theirs=THREE, ours=COCO)
    for name in ("dog", "person"):
        assert same(rows(model.state_dict(), COCO, name), rows(ours, THREE, name))
    assert same(rows(model.state_dict(), COCO, "cat")[2:], rows(fresh, COCO, "cat")[2:])
    # nothing starts anew: neither order nor number is a misfit
    whole = tiny_model(num_classes=2)
    done = load_into(whole, ours, theirs=THREE, ours=["person", "dog"])
    assert not done.rows and not done.anew and not done.left
    for name in ("dog", "person"):
        assert same(rows(whole.state_dict(), ["person", "dog"], name), rows(ours, THREE, name))
    # equal names in equal order: the weights as they are
    load_into(model := tiny_model(), ours, theirs=THREE, ours=THREE)
    assert all(torch.equal(value, ours[key]) for key, value in model.state_dict().items())


def test_a_new_class_is_refused_unless_asked_for_and_both_ways_out_work():
    ours = tiny_model(seed=1).state_dict()
    with pytest.raises(ValueError, match=r"reset_heads=true .*strict=false .* lack: cat; they have dog"):
        load_into(tiny_model(), ours, theirs=THREE, ours=["dog", "person", "cat"])
    for way in ({"reset_heads": True}, {"strict": False}):
        done = load_into(tiny_model(), ours, theirs=THREE, ours=["dog", "person", "cat"], **way)
        assert done.classes.new == ["cat"] and {*done.rows} == {*BOXES, *MASKS} and not done.anew
    # no shared class: not even the background is worth keeping
    model = tiny_model()
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    done = load_into(model, ours, reset_heads=True, theirs=THREE, ours=["a", "b", "c"])
    assert {*done.anew} == {*BOXES, *MASKS} and not done.rows
    assert all(torch.equal(model.state_dict()[key], fresh[key]) for key in done.anew)


def table(done) -> dict[str, list[str]]:
    lines = [line.split() for line in str(done).splitlines()[1:]]
    return {line[0]: line[1:] for line in lines}


def test_boxes_from_masks_and_back_need_no_word():
    with_masks, boxes = tiny_model(seed=1), tiny_model(mask=False, seed=2)
    masks = sum(key.startswith("mask_head.") for key in with_masks.state_dict())
    done = load_into(model := tiny_model(mask=False), with_masks.state_dict(), theirs=THREE, ours=THREE)
    assert all(torch.equal(value, with_masks.state_dict()[key]) for key, value in model.state_dict().items())
    assert table(done)["mask_head"] == ["-", "-", "-", str(masks)] and table(done)["box_head"][1:] == ["-"] * 3
    done = load_into(model := tiny_model(), boxes.state_dict())
    assert torch.equal(model.box_head.trunk.fc[0].weight, boxes.box_head.trunk.fc[0].weight)
    assert table(done)["mask_head"] == ["-", "-", str(masks), "-"]
    # what the issue reports: a mask model for other classes into one of boxes
    eighty = tiny_model(num_classes=80, seed=3).state_dict()
    with pytest.raises(ValueError, match=r"weights\.reset_heads=true"):
        load_into(tiny_model(mask=False), eighty, theirs=COCO, ours=THREE)
    done = load_into(tiny_model(mask=False), eighty, reset_heads=True, theirs=COCO, ours=THREE)
    assert {*done.rows} == {*BOXES}


def test_another_pyramid_roi_method_or_head_keeps_what_fits():
    state = tiny_model(seed=1).state_dict()
    model = tiny_model(roi=partial(DeformableRoIPool, predictor_width=8))
    with pytest.raises(ValueError, match=r"of\? weights\.strict=false .*box_head\.extractor\.op\.offset_predictor"):
        load_into(model, state, reset_heads=True)  # which would not help, and is not advised
    done = load_into(model, state, strict=False)
    assert all(".offset_predictor." in key for key in done.anew) and not done.left
    assert "anew: extractor.op.offset_predictor" in str(done)

    settings = {"roi": RoIAlign, "trunk": partial(FCTrunk, fc_channels=[32]), "batch_size_per_image": 32}
    cascade = tiny_model()
    cascade.box_head = CascadeBoxHead(16, cascade.neck.strides[:4], 3, **settings)
    done = load_into(cascade, state, strict=False, theirs=THREE, ours=THREE)
    for stage in cascade.box_head.stages:
        assert torch.equal(stage.trunk.fc[0].weight, state["box_head.trunk.fc.0.weight"])
        assert torch.equal(stage.predictor.class_logits.weight, state[BOXES[0]])
    assert all(".box_deltas." in key for key in done.anew)  # theirs are by class, a cascade's are not
    with pytest.raises(ValueError, match=r"strict=false"):
        load_into(tiny_model(), cascade.state_dict())
    done = load_into(model := tiny_model(), cascade.state_dict(), strict=False)
    assert torch.equal(model.box_head.trunk.fc[0].weight, state["box_head.trunk.fc.0.weight"])
    assert {key.split(".")[2] for key in done.left} == {"1", "2"}

    model.neck.output = nn.ModuleList(list(model.neck.output)[:2])
    done = load_into(model, state, strict=False)
    assert table(done)["neck"][3] != "-" and table(done)["neck"][0] != "-"


TINY = ["model=mask_rcnn", *OVERRIDES]


def test_a_run_starts_from_a_checkpoint_of_ours_by_its_categories(tmp_path, caplog):
    cfg = composed(*TINY)
    ours = build(cfg.model, "model", num_classes=3).state_dict()
    saved = {"model": ours, "ema": None, "config": {"model": {}}, "categories": THREE, "category_ids": [1, 2, 3]}
    checkpoints.save(saved, tmp_path / "ours.pt")
    checkpoints.save_safetensors(saved, tmp_path / "ours.safetensors")
    for name in ("ours.pt", "ours.safetensors"):
        for way, accepted in {
            "weights.reset_heads=true": True,
            "weights.strict=false": True,
            "weights.categories=[cat,dog,bird]": True,  # what the file says is not asked then
            "weights.strict=true": False,
        }.items():
            cfg = composed(*TINY, f"model.weights={tmp_path / name}", way)
            start = build(cfg.weights, "weights")
            weights = start.read(cfg)
            model, classes = build(cfg.model, "model", num_classes=2), ["cat", "dog"]
            if not accepted:
                with pytest.raises(ConfigError, match=r"model\.weights: weights do not fit .* lack: cat"):
                    start.load(model, weights, classes)
                continue
            caplog.clear()
            with caplog.at_level(logging.INFO):
                start.load(model, weights, classes)
            source = 1 if "categories" in way else 0
            assert torch.equal(model.box_head.predictor.class_logits.weight[2], ours[BOXES[0]][1 + source])
            assert ("2 kept: cat, dog" if source else "1 kept: dog; 1 new: cat") in caplog.text
            assert caplog.text.count("by class") == 1
    cfg = composed(*TINY, f"model.weights={tmp_path / 'ours.pt'}", "weights.categories=[cat]")
    with pytest.raises(ConfigError, match=r"model\.weights: categories: 1 names for the 3 classes"):
        build(cfg.weights, "weights").read(cfg)


def test_a_checkpoint_trained_on_other_pixels_is_told_apart(tmp_path, caplog):
    cfg = composed(*TINY)
    model = {"channel_order": "bgr", "pixel_mean": [1.0, 2.0, 3.0], "backbone": {"stride_in_1x1": True}}
    state = {"rpn.head.deltas.bias": torch.zeros(12)}
    saved = {"model": state, "ema": None, "config": {"model": model}, "categories": THREE, "category_ids": [1, 2, 3]}
    checkpoints.save(saved, tmp_path / "ours.pt")
    file = f"model.weights={tmp_path / 'ours.pt'}"
    cfg = composed(*TINY, file)
    build(cfg.weights, "weights").read(cfg)
    [said] = warnings_of(caplog)
    said = said.partition(": add ")[2]
    assert said == "'model.channel_order=bgr' 'model.pixel_mean=[1.0, 2.0, 3.0]' '+model.backbone.stride_in_1x1=True'"
    caplog.clear()
    cfg = composed(*TINY, file, *said.strip("'").split("' '"))
    build(cfg.weights, "weights").read(cfg)
    assert not warnings_of(caplog)


def warnings_of(caplog) -> list[str]:
    """What was warned of; an earlier training in this process lets less be heard too."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_mmdetection_tells_its_classes():
    theirs, _ = FRAMEWORKS["mmdet"]()
    names = tuple(f"class {i}" for i in range(80))
    for meta in ({"dataset_meta": {"classes": names}}, {"CLASSES": names}):
        assert read_foreign({"meta": meta, "state_dict": theirs}).categories == list(names)
    assert read_foreign({"meta": {}, "state_dict": theirs}).categories == COCO
    three = {"roi_heads.box_predictor.cls_score.bias": torch.zeros(4)}
    assert read_foreign(three, source="detectron2").categories is None


def test_convert_and_export_take_checkpoints_of_ours(state, tmp_path, capsys):
    averaged = {key: value * 2 for key, value in state["model"].items()}
    checkpoints.save(state | {"ema": averaged, "optimizer": {}}, tmp_path / "run.pt")
    files = [tmp_path / name for name in ("run.pt", "a.safetensors", "b.safetensors", "c.pt", "d.pt")]
    assert main(["export", *map(str, files[0:2])]) == 0
    assert main(["export", *map(str, files[1:3])]) == 0
    assert main(["convert", *map(str, files[2:4])]) == 0
    assert f"{files[3]}: ResNet-10, 5 classes" in capsys.readouterr().out
    assert main(["convert", str(files[0]), str(files[4])]) == 0
    expected = detector.load(files[0])
    for file in files[1:]:
        found = detector.load(file)
        assert found.categories == state["categories"] and found.category_ids == state["category_ids"]
        assert found.config == expected.config
        assert all(torch.equal(value, averaged[key]) for key, value in found.model.state_dict().items())
    assert "optimizer" not in checkpoints.load(files[4])
    assert main(["convert", str(files[0]), str(files[4]), "--style", "caffe"]) == 2
    assert "style='caffe': the config in" in capsys.readouterr().err
