"""What a run says: before it begins, while it learns and measures, when memory is full, when it has learnt enough."""

from __future__ import annotations

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch

from detector import checkpoint
from detector.config import RunError
from detector.engine import journal as journal_module
from detector.engine import train
from detector.evaluation import evaluator
from tests.runs import curve


def words(folder) -> str:
    return (folder / "train.log").read_text(encoding="utf-8")


def test_a_run_begins_with_what_it_is(run, shapes_tiny):
    folder = run("schedule.max_iterations=1", "schedule.warmup=0", "training.reference_batch=16", "optimizer.lr=0.04")
    said = {
        name.strip(): text for name, text in re.findall(r"^(?:.*INFO )?(.{14}) (\S.*)$", words(folder), re.MULTILINE)
    }
    state = checkpoint.load(folder / "last.pt")
    norms = ("running", "num_batches", "pixel_")
    size = sum(v.numel() for k, v in state["model"].items() if not any(name in k for name in norms))
    assert said["parameters"].startswith(f"{size / 1e6:.2f} M, trained")
    truth = json.loads((shapes_tiny / "annotations" / "instances_train.json").read_text(encoding="utf-8"))
    assert said["training"] == f"24 images, {len(truth['annotations'])} objects" and said["validation"].startswith(
        "8 images, "
    )
    assert said["classes"] == "5: " + ", ".join(state["categories"])
    assert said["learning rate"] == "0.01, after scaling"  # 4 of 16 images
    assert said["length"] == "1 iterations of 4 images, 0.2 epochs; evaluated every 1"
    assert said["device"] == "cpu, fp32, 1 threads" and said["starts from"] == "nothing: from scratch"
    assert said["RoI methods"].startswith("box_head: RoIAlign, 7 x 7 bins; mask_head: RoIAlign")
    assert said["results"] == str(folder)


def test_the_first_steps_are_told_and_how_long_it_took(run):
    folder = run("schedule.max_iterations=6", "runtime.log_every=1000")
    run("schedule.max_iterations=8", "runtime.log_every=1000")
    assert list(curve(folder)) == [1, 2, 5, 6, 8]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    elapsed = [line["elapsed"] for line in lines if "elapsed" in line]
    assert elapsed == sorted(elapsed) and 0 < elapsed[0] < elapsed[-1]


def test_the_time_left_has_the_evaluations_in_it(run, monkeypatch):
    """Steps take next to nothing here, evaluations ten minutes."""
    always = property(lambda self: 600.0, lambda self, seconds: None)
    monkeypatch.setattr(train.Journal, "evaluation_took", always, raising=False)
    folder = run("schedule.max_iterations=4", "evaluation.every=2")
    left = re.findall(r"(\d)/4  loss.* (\d+):\d\d left", words(folder))
    assert left == [("1", "20"), ("2", "10"), ("3", "10"), ("4", "0")]


def test_the_time_left_before_the_first_evaluation_guesses_how_long_it_takes():
    run = SimpleNamespace(evaluate_every=2, val_set=range(1200))
    journal = SimpleNamespace(run=run, total=4, began=0.0, first=0, evaluation_took=0.0)
    assert journal_module.Journal.left(journal, 1, now=1.0, images_per_second=2.0) == 3 + 2 * 600
    journal.evaluation_took = 10.0
    assert journal_module.Journal.left(journal, 2, now=2.0, images_per_second=2.0) == 2 + 10


def test_evaluations_tell_how_far_they_are(run, monkeypatch):
    monkeypatch.setattr(evaluator, "TELL_EVERY", 0.0)
    said = words(run("schedule.max_iterations=1", "schedule.warmup=0"))
    assert "evaluated 4 of 8 images" in said and "evaluated 8 of 8 images" in said


@pytest.mark.parametrize(("verbosity", "told", "steps"), [("quiet", False, [1, 2, 4]), ("debug", True, [1, 2, 3, 4])])
def test_verbosity(run, capsys, verbosity, told, steps):
    folder = run("schedule.max_iterations=4", "runtime.log_every=10", f"runtime.verbosity={verbosity}")
    assert list(curve(folder)) == steps
    assert ("finished after 4" in capsys.readouterr().err) == told
    assert "finished after 4" in words(folder) and ("weight decay" in words(folder)) == (verbosity == "debug")
    logging.getLogger("detector").setLevel(logging.INFO)


@pytest.mark.slow
def test_patience_ends_a_run_that_learns_nothing_more(run):
    common = ["optimizer.lr=0.0", "evaluation.every=1", "schedule.max_iterations=8"]
    folder = run(*common, "training.patience=2")
    assert list(curve(folder)) == [1, 2, 3]  # the first is the best, two bring nothing better
    assert {"bbox", "segm"} <= set(json.loads((folder / "metrics.json").read_text()))
    assert (folder / "predictions.json").is_file()
    run(*common, "training.patience=2")
    assert "is finished: 3 iterations. A larger training.patience, trains more" in words(folder)
    run(*common, "training.patience=3")
    assert list(curve(folder)) == [1, 2, 3, 4]


def test_full_memory_names_what_to_lower(run, monkeypatch, tmp_path):
    original = train.update

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr(train, "update", full)
    short = ["schedule.max_iterations=2", "schedule.warmup=0"]
    says = r"memory is full with 4 images at once \(\d.*free; CUDA out of memory.*2\.00 GiB\.\)\. Set.*: (\S+) \(the"
    with pytest.raises(RunError, match=says) as error:
        run(*short)
    monkeypatch.setattr(train, "update", original)
    assert list(curve(run(*short, re.search(says, str(error.value))[1], "resume=none"))) == [1, 2]
