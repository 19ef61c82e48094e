"""NaN in a batch, in a gradient and in a weight; a run folder in use; data that does not fit."""

from __future__ import annotations

import json

import pytest
import torch

from detector import checkpoint
from detector.comparison.runs import is_run
from detector.config import ConfigError, RunError
from detector.engine import train
from detector.engine.run_folder import locked
from tests.runs import curve


def poison(monkeypatch, at: set[int], what: str) -> None:
    """Make the steps `at` (1, 2, ...) not finite, in the batch, the loss, in the gradient alone or in a weight."""
    original, calls = train.forward_backward, iter(range(1, 1000))

    def forward_backward(model, micro_batches, *args, **kwargs):
        step = next(calls)
        if step in at and what == "batch":
            boxes = micro_batches[0][1].boxes.clone()
            boxes[0, 0, 2] = float("nan")
            micro_batches = [(micro_batches[0][0], micro_batches[0][1]._replace(boxes=boxes))]
        if step in at and what == "weight":
            with torch.no_grad():
                model.box_head.predictor.class_logits.bias[0] = float("nan")
        losses, stats = original(model, micro_batches, *args, **kwargs)
        if step in at and what == "loss":
            losses["loss_mask"] = losses["loss_mask"] * float("inf")
        if step in at and what == "gradient":
            next(p for p in model.parameters() if p.grad is not None).grad[0] = float("nan")
        return losses, stats

    monkeypatch.setattr(train, "forward_backward", forward_backward)


@pytest.mark.parametrize(
    ("what", "words"),
    [("batch", "loss_rpn_box_reg = nan"), ("loss", "loss_mask = inf"), ("gradient", "the gradient's norm = nan")],
)
def test_stop_names_terms_images_and_files_and_keeps_the_batch(run, monkeypatch, tmp_path, what, words):
    poison(monkeypatch, {3}, what)
    with pytest.raises(RunError, match=r"stopped before step 3.*runtime\.on_nonfinite=skip"):
        run()
    text = (tmp_path / "run" / "train.log").read_text()
    assert f"step 3 is not finite: {words}" in text
    saved = torch.load(tmp_path / "run" / "nonfinite_0000003_rank0.pt", weights_only=True)
    batch = saved["batches"][0]["batch"]
    assert batch["images"].dtype == torch.uint8
    assert len(batch["image_ids"]) == 4
    for image in batch["image_ids"].tolist():
        assert f"{image} (" in text
    assert ".jpg" in text
    assert saved["batches"][0]["targets"]["boxes"].shape[0] == 4


def test_stopped_run_goes_on_with_skip(run, monkeypatch, tmp_path):
    """What was learned until the bad step is kept, and the next start only needs the other policy."""
    poison(monkeypatch, {3}, "loss")
    with pytest.raises(RunError):
        run()
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iteration"] == 2
    monkeypatch.undo()
    poison(monkeypatch, {1}, "loss")  # the first step of this start is the run's third
    run("runtime.on_nonfinite=skip")
    assert list(curve(tmp_path / "run")) == [1, 2, 4, 5, 6, 7, 8]


def test_skip_leaves_the_weights_alone(run, monkeypatch, tmp_path):
    poison(monkeypatch, {2}, "gradient")
    two = run(
        "schedule.max_iterations=2", "schedule.warmup=1", "runtime.on_nonfinite=skip", "runtime.checkpoint_every=1"
    )
    one, both = (checkpoint.load(two / f"iteration_000000{i}.pt") for i in (1, 2))
    parameters = [key for key in one["model"] if "running" not in key and "num_batches" not in key]
    assert all(torch.equal(one["model"][key], both["model"][key]) for key in parameters)
    assert both["nonfinite"] == 1
    assert both["iteration"] == 2


def test_too_many_skips_stop(run, monkeypatch):
    poison(monkeypatch, {2, 3, 4}, "loss")
    with pytest.raises(RunError, match=r"stopped before step 4.*runtime\.max_nonfinite = 2"):
        run("runtime.on_nonfinite=skip", "runtime.max_nonfinite=2")


def test_a_nan_weight_is_named_and_never_saved(run, monkeypatch, tmp_path):
    poison(monkeypatch, {4}, "weight")
    with pytest.raises(RunError, match=r"weights are not finite: box_head\.predictor\.class_logits\.bias"):
        run("runtime.on_nonfinite=skip", "runtime.checkpoint_every=2")
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["iteration"] == 2
    assert all(value.float().isfinite().all() for value in state["model"].values())


def test_folder_in_use(run, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(RunError, match="is in use by process"):
        run()


def test_categories_of_another_data_set_are_refused(run, config, shapes_tiny, tmp_path):
    folder = run("schedule.max_iterations=2", "schedule.warmup=0")
    path = folder / "last.pt"
    state = {k: v for k, v in checkpoint.load(path).items() if k not in ("format", "versions")}
    checkpoint.save({**state, "categories": ["cat"]}, path)
    with pytest.raises(ConfigError, match=r"the checkpoint's categories are \['cat'\]"):
        run("schedule.max_iterations=2", "schedule.warmup=0")


def test_train_and_val_must_have_the_same_categories(run, shapes_tiny, tmp_path):
    file = shapes_tiny / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "renamed"
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="renamed"):
        run(f"data.val.annotations={tmp_path / 'val.json'}")


def test_broken_annotations_end_before_training(run, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^data: .*bad\.json"):
        run(f"data.train.annotations={tmp_path / 'bad.json'}")


def test_missing_annotations_name_the_command_that_makes_them(run, shapes_tiny):
    with pytest.raises(
        ConfigError, match=r"data.val.annotations: \S*none.json does not exist; make it with: detector shapes --out "
    ) as error:
        run("data.val.annotations=none.json")
    assert "or data.val.annotations to one of annotations/instances_train.json, annotations/inst" in str(error.value)


def test_a_data_set_that_is_not_there_names_the_folder_beside_it(run, shapes_tiny):
    with pytest.raises(ConfigError) as error:
        run(f"data.root={shapes_tiny}s")
    assert f"{shapes_tiny}s' does not exist; did you mean {shapes_tiny.name}" in str(error.value)


def test_a_start_that_fails_leaves_no_run(run, tmp_path, monkeypatch):
    """Until there is a checkpoint; then the folder stays what it is."""
    real = train.forward_backward

    def fail(*given, **options):
        if fail.after == 0:
            raise ValueError("no step can be taken")
        fail.after -= 1
        return real(*given, **options)

    monkeypatch.setattr(train, "forward_backward", fail)
    for after, kept in ((1, False), (2, True)):
        fail.after = after
        with pytest.raises(ValueError, match="no step can be taken"):
            run("runtime.checkpoint_every=2", "schedule.max_iterations=3", "runtime.tensorboard=true")
        held = {path.name for path in (tmp_path / "run").iterdir()}
        assert ({"config.yaml", "log.jsonl", "tensorboard", "last.pt"} <= held) == kept
        assert kept or held == {"train.log", ".lock"}
    assert is_run(tmp_path / "run")


def test_a_run_folder_that_cannot_be_written_to_is_refused(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run_dir = '.*file': nothing can be written there \(File exists\)"):
        run(f"run_dir={tmp_path / 'file'}")


@pytest.mark.parametrize(
    "override", ["model.backbone.depth=7", "optimizer.lr=-1.0", "seed=-1", "training.lr_multipliers.backbone=-1.0"]
)
def test_ranges_are_refused_before_data_is_read(run, monkeypatch, override, tmp_path):
    from detector.engine import setup

    monkeypatch.setattr(setup, "build_dataset", lambda *_, **__: pytest.fail("data was read"))
    with pytest.raises(ConfigError):
        run(override)
    assert not (tmp_path / "run").exists()
