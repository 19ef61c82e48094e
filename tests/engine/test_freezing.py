"""Frozen parts keep every bit until they thaw, however often the run is interrupted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detector import checkpoint
from detector.config import ConfigError
from detector.engine.freezing import frozen_parts
from tests.runs import curve
from tests.tiny import tiny_model

FROZEN = ["training.freeze=[backbone,rpn]", "training.thaw_at=2", "training.ema_decay=0.9", "schedule.warmup=0"]
FROZEN += [
    "schedule.max_iterations=4",
    "runtime.checkpoint_every=1",
    "runtime.keep=9",
    "optimizer=adamw",
    "optimizer.lr=1e-3",
]


def parts_that_differ(a: dict, b: dict) -> set[str]:
    return {key.split(".")[0] for key in a["model"] if not torch.equal(a["model"][key], b["model"][key])}


@pytest.mark.slow
def test_nothing_changes_until_the_thaw_and_resuming_changes_nothing(run, tmp_path):
    """Frozen: no weight, no statistics of norms, no weight decay. A run cut before, at or after the thaw ends as the
    unbroken one does, to the bit."""
    whole = run(*FROZEN, f"run_dir={tmp_path / 'whole'}")
    states = {i: checkpoint.load(whole / f"iteration_000000{i}.pt") for i in (1, 2, 3)}
    assert parts_that_differ(states[1], states[2]) == {"neck", "box_head", "mask_head"}
    assert parts_that_differ(states[2], states[3]) == {"neck", "box_head", "mask_head", "backbone", "rpn"}
    statistics = [key for key in states[2]["model"] if key.startswith("backbone.") and key.endswith("running_mean")]
    assert all(torch.equal(states[2]["model"][key], torch.zeros_like(states[2]["model"][key])) for key in statistics)
    assert statistics and not any(torch.equal(states[2]["model"][key], states[3]["model"][key]) for key in statistics)
    log = (whole / "train.log").read_text()
    assert "frozen         backbone, rpn: 0.08 M, until iteration 2" in log
    assert "iteration 2: backbone, rpn thaw" in log
    assert "have no weights from elsewhere: they stay random until iteration 2" in log

    last = checkpoint.load(whole / "last.pt")
    for cut, state in states.items():
        part = tmp_path / str(cut)
        part.mkdir()
        checkpoint.save({k: v for k, v in state.items() if k not in ("format", "versions")}, part / "last.pt")
        run(*FROZEN, f"run_dir={part}")
        found = checkpoint.load(part / "last.pt")
        assert not parts_that_differ(last, found), cut
        assert all(torch.equal(last["ema"][key], found["ema"][key]) for key in last["ema"])
        assert curve(part) == {iteration: losses for iteration, losses in curve(whole).items() if iteration > cut}

    # from weights, and to the end
    file = whole / "best.pt"
    again = run("training.freeze=[backbone]", "schedule.max_iterations=3", f"model.weights={file}", "optimizer=sgd")
    kept, found = checkpoint.load(file)["ema"], checkpoint.load(again / "last.pt")["model"]
    assert {key.split(".")[0] for key in found if not torch.equal(found[key], kept[key])} >= {"rpn", "box_head"}
    assert all(torch.equal(found[key], kept[key]) for key in found if key.startswith("backbone."))
    log = (again / "train.log").read_text()
    assert f"starts from    model.weights = {file}\n" in log and "stay random" not in log and "thaw" not in log


def test_names_are_checked():
    model = tiny_model()
    trained = list(model.parameters())
    assert frozen_parts(model, [], trained).parameters == []
    inside = frozen_parts(model, ["backbone.layer1"], trained).parameters
    assert {id(p) for p in inside} == {id(p) for p in model.backbone.layer1.parameters()}
    with pytest.raises(
        ConfigError, match=r"no part 'bakbone'; did you mean backbone\? It has backbone, neck, rpn, box_"
    ):
        frozen_parts(model, ["bakbone"], trained)
    with pytest.raises(ConfigError, match=r"no part 'backbone.layer5'; did you mean backbone.layer"):
        frozen_parts(model, ["backbone.layer5"], trained)
    with pytest.raises(ConfigError, match="nothing is left that learns"):
        frozen_parts(model, ["backbone", "neck", "rpn", "box_head", "mask_head"], trained)


def test_what_stays_frozen_for_another_reason_does_not_thaw():
    model = tiny_model()
    model.backbone.conv1.requires_grad_(False)  # as `frozen_stages` does it
    frozen = frozen_parts(model, ["backbone"], [p for p in model.parameters() if p.requires_grad])
    frozen.set_mode(held=True)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert not any(m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    assert model.rpn.training and model.backbone.training
    frozen.set_mode(held=False)
    assert [name for name, p in model.backbone.named_parameters() if not p.requires_grad] == ["conv1.weight"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["training.freeze=[rpm]"], "no part 'rpm'; did you mean rpn"),
        (["training.thaw_at=4"], "thaw_at = 4: must be null: freeze names nothing"),
        (["training.freeze=[rpn]", "training.thaw_at=soon"], "thaw_at"),
        (["training.freeze=[rpn]", "training.thaw_at=9"], "thaw_at = 9: is iteration 9.*not inside the run of 8"),
        (["training.layer_decay=0.7"], "ResNet does not tell its layers apart; null, or .*=swin_tiny"),
        (["training.layer_decay=1.5"], "layer_decay"),
    ],
)
def test_settings_that_cannot_work_are_refused(run, settings, message):
    with pytest.raises(ValueError, match=message):
        run(*settings)
