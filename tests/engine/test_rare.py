"""Rare classes: weights by name or by frequency, other losses of the classifier; and the loss on the validation set."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

from detector import checkpoint
from detector.config import ConfigError
from tests.runs import curve

SHORT = ["schedule.max_iterations=2", "schedule.warmup=0"]


@pytest.mark.slow
def test_weights_of_classes(run, shapes_tiny, tmp_path):
    plain = curve(run(*SHORT, f"run_dir={tmp_path / 'plain'}"))
    named = run(*SHORT, "training.class_weights={star:3,ring:0}", f"run_dir={tmp_path / 'named'}")
    stored = yaml.safe_load((named / "config.yaml").read_text())
    assert stored["model"]["box_head"]["class_weights"] == [1, 1, 1, 3, 0]
    assert curve(named)[1]["loss_classifier"] != plain[1]["loss_classifier"]
    assert {k: v for k, v in curve(named)[1].items() if k in ("loss_mask", "loss_objectness")}.items() <= plain[
        1
    ].items()

    auto = run(*SHORT, "training.class_weights=auto", f"run_dir={tmp_path / 'auto'}")
    truth = json.loads((shapes_tiny / "annotations" / "instances_train.json").read_text())
    counts = np.bincount([entry["category_id"] for entry in truth["annotations"]])
    counts = counts[[category["id"] for category in truth["categories"]]]
    weights = np.array(yaml.safe_load((auto / "config.yaml").read_text())["model"]["box_head"]["class_weights"])
    assert (weights * counts).sum() == pytest.approx(counts.sum(), rel=1e-3)
    np.testing.assert_allclose(weights * np.sqrt(counts), (weights * np.sqrt(counts))[0], rtol=1e-3)
    run(*SHORT, "schedule.max_iterations=3", "training.class_weights=auto", f"run_dir={tmp_path / 'auto'}")
    assert list(curve(auto)) == [1, 2, 3]


def test_weights_that_no_class_can_have(run):
    with pytest.raises(ConfigError, match=r"training\.class_weights\.stra: the data have no .*did you mean star"):
        run("training.class_weights={stra:2}")
    run(*SHORT, "training.class_weights={star:2}")
    with pytest.raises(ConfigError, match=r"training: class_weights\.star = -1"):
        run("training.class_weights={star:-1}", "resume=none")


@pytest.mark.slow
def test_seesaw_goes_on_where_it_stopped(run, tmp_path):
    """Interrupted or not, the counts and with them the losses are the same; its checkpoint starts a plain run too."""
    body = ["class_loss@model.box_head.class_loss=seesaw", "schedule=step", "schedule.max_epochs=null"]
    body += ["schedule.warmup=0", "schedule.milestones=[]"]
    whole = run(*body, "schedule.max_iterations=4", f"run_dir={tmp_path / 'whole'}")
    parts = run(*body, "schedule.max_iterations=2", f"run_dir={tmp_path / 'parts'}")
    seen = checkpoint.load(parts / "last.pt")["model"]["box_head.class_loss.seen"]
    assert 0 < seen.sum() < checkpoint.load(whole / "last.pt")["model"]["box_head.class_loss.seen"].sum()
    run(*body, "schedule.max_iterations=4", f"run_dir={tmp_path / 'parts'}")
    assert curve(parts) == curve(whole)
    run(*SHORT, f"model.weights={whole / 'last.pt'}", f"run_dir={tmp_path / 'plain'}")
    run(*SHORT, body[0], f"model.weights={tmp_path / 'plain' / 'last.pt'}", f"run_dir={tmp_path / 'again'}")


@pytest.mark.slow
def test_the_loss_on_the_validation_set(run, tmp_path, shapes_tiny):
    """The terms of the training's, and a run that is otherwise the same to the bit."""
    dropout = ["training.ema_decay=0.5", "evaluation.every=2", "schedule.max_iterations=4"]
    plain = run(*dropout, f"run_dir={tmp_path / 'plain'}")
    watched = run(*dropout, "evaluation.losses=true", f"run_dir={tmp_path / 'watched'}")
    assert curve(watched) == curve(plain)
    old, new = (checkpoint.load(folder / "last.pt") for folder in (plain, watched))
    for part in ("model", "ema"):
        assert all(torch.equal(value, new[part][key]) for key, value in old[part].items())
    assert torch.equal(old["rng"][0]["torch"], new["rng"][0]["torch"])
    assert (plain / "metrics.json").read_text() == (watched / "metrics.json").read_text()

    lines = [json.loads(line) for line in (watched / "log.jsonl").read_text().splitlines()]
    found = [line["losses"] for line in lines if "metrics" in line]
    terms = {key for key in curve(plain)[1] if key.startswith("loss")}
    assert len(found) == 2 and all(losses.keys() == terms for losses in found)
    assert found[1]["loss"] == pytest.approx(sum(v for k, v in found[1].items() if k != "loss"))
    assert found[0] != found[1] and "validation  loss " in (watched / "train.log").read_text()


def test_the_validation_loss_of_tiles_is_refused(run):
    with pytest.raises(ConfigError, match=r"evaluation: losses = True: must be false with tiles"):
        run("evaluation.losses=true", "evaluation.tiles.size=64")
