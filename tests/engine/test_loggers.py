"""Where numbers and pictures go: TensorBoard, CSV, Weights & Biases offline, MLflow's file store."""

from __future__ import annotations

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector.config import ConfigError
from detector.engine import loggers
from detector.inference.draw import beside_truth
from detector.structures import Batch, Detections, Targets
from tests.config.test_config import complaint
from tests.runs import curve

# a schedule whose first steps do not depend on its length
PART = [
    "schedule=step",
    "schedule.max_epochs=null",
    "schedule.warmup=0",
    "schedule.milestones=[]",
    "evaluation.every=2",
]


@pytest.mark.slow
def test_csv_is_the_curve_of_one_run(run):
    folder = run(*PART, "logger=[csv]", "schedule.max_iterations=2", "runtime.checkpoint_every=2")
    with open(folder / "scalars.csv", "a") as file:  # of a process that was killed later
        file.write("3,loss/loss,9.0\n")
    run(*PART, "logger=[csv]", "schedule.max_iterations=4")
    with open(folder / "scalars.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["iteration"]): float(row["value"]) for row in rows if row["tag"] == "loss/loss"}
    assert losses == {iteration: values["loss"] for iteration, values in curve(folder).items()}
    last = {row["tag"]: float(row["value"]) for row in rows if row["iteration"] == "4"}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert last["segm/AP"] == metrics["segm"]["AP"] and metrics["bbox"]["APl"] == -1 and "bbox/APl" not in last


def test_tensorboard_shows_short_runs_and_every_method(run):
    """Pictures at the end, sizes of RoIs of any method, no curves of -1; the tags are those that they always were."""
    folder = run("runtime.tensorboard=true", "schedule.max_iterations=3", "runtime.histograms_every=1")
    board = EventAccumulator(str(folder / "tensorboard"), {"histograms": 0, "images": 0}).Reload()
    tags = board.Tags()
    assert [event.step for event in board.Images("predictions/1")] == [3]
    assert tags["histograms"] == ["box_head/roi_sizes", "mask_head/roi_sizes"]
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    own = {key for key, value in line.items() if isinstance(value, (int, float)) and key != "iteration"}
    wanted = {f"{'loss' if key.startswith('loss') else 'run'}/{key}" for key in own}
    metrics = json.loads((folder / "metrics.json").read_text())
    wanted |= {f"{kind}/{k}" for kind, numbers in metrics.items() for k, value in numbers.items() if value != -1}
    assert set(tags["scalars"]) == wanted and "bbox/APl" not in wanted


@pytest.mark.slow
def test_mlflow_keeps_one_run_that_goes_on(run, tmp_path):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    store = (tmp_path / "store").as_uri()
    ours = [*PART, "logger=[mlflow]", f"logger.mlflow.tracking_uri={store}", "logger.mlflow.experiment=mine"]
    run(*ours, "schedule.max_iterations=2")
    folder = run(*ours, "schedule.max_iterations=3")
    client = MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == "train"
    history = {m.step: m.value for m in client.get_metric_history(found.info.run_id, "loss/loss")}
    assert history == {iteration: values["loss"] for iteration, values in curve(folder).items()}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert found.data.metrics["final/segm/AP"] == metrics["segm"]["AP"]
    assert found.data.tags["optimizer.lr"] == "0.02"
    files = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "best.pt", "predictions"} <= files
    assert "predictions/0_0000003.png" in {f.path for f in client.list_artifacts(found.info.run_id, "predictions")}
    other = loggers.MLflow(folder, "anew", 0, store, "mine")
    assert other.id != found.info.run_id and len(client.search_runs([found.info.experiment_id])) == 2


def test_a_server_that_is_lost_ends_no_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    asked, told = [], []

    def lost(*values):
        asked.append(values)
        raise MlflowException("no route to host")

    monkeypatch.setattr(MlflowClient, "log_batch", lost)
    monkeypatch.setattr(loggers.log, "warning", lambda text, *values: told.append(text % values))
    logger = loggers.MLflow(tmp_path, "run", 0, (tmp_path / "store").as_uri())
    for iteration in (1, 2):
        logger.scalars({"loss/loss": 1.0}, iteration)
    assert len(asked) == 1 and told == ["mlflow gets nothing more of this run: no route to host"]


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_that_goes_on(run, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    ours = [*PART, "logger=[wandb]", "logger.wandb.mode=offline"]
    run(*ours, "schedule.max_iterations=2")
    folder = run(*ours, "schedule.max_iterations=3")
    name = json.loads((folder / "loggers.json").read_text())["wandb"]
    parts = sorted((folder / "wandb").glob(f"offline-run-*-{name}"))
    assert parts and len(parts) == len(list((folder / "wandb").glob("offline-run-*")))  # of one second: in one folder
    for part in parts:
        (records,) = part.glob("*.wandb")
        content = records.read_bytes()
        assert all(
            tag in content for tag in (b"loss/loss", b"segm/AP", b"post_nms_top_n", f"checkpoint-{name}".encode())
        )
        assert list((part / "files" / "media").glob("**/*.png"))


def test_a_logger_without_its_package_is_refused_before_any_work(config, monkeypatch):
    monkeypatch.setattr(loggers.TensorBoard, "needs", "no_such_package")
    cfg = config("runtime.tensorboard=true")
    with pytest.raises(ConfigError, match=r"logger\.tensorboard: no_such_package is not installed: pip install"):
        loggers.chosen_loggers(cfg)
    cfg.runtime.tensorboard = False
    assert loggers.chosen_loggers(cfg) == {}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["logger.wandb.mode=offline"], r"wandb is not among the loggers; add logger=\[tensorboard,wandb\]$"),
        (["logger=[tensorboard,wandb]", "logger.wandb.mod=offline"], "did you mean logger.wandb.mode"),
        (["logger=[tensorboard,wandv]"], "configs/logger has no 'wandv'; did you mean wandb"),
        (
            ["logger=[wandb]", "logger.wandb.mode=off"],
            r"logger\.wandb\.mode = 'off': .*'online', 'offline', 'disabled'",
        ),
        (["wandb=true"], r"here that is logger=\[tensorboard,wandb\]"),
    ],
)
def test_settings_of_loggers(typed, message):

    assert re.search(message, complaint(*typed))


def test_crowd_regions_are_in_the_truth_panel():
    """Hatched, on the right of two panels; what is predicted is as it was."""
    image = torch.full((1, 3, 800, 800), 90, dtype=torch.uint8)
    sizes = torch.tensor([[800, 800]])
    batch = Batch(image, sizes, sizes, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    none = torch.zeros(1, 0)
    detections = Detections(torch.zeros(1, 0, 4), none, none.long(), none.bool())
    boxes = torch.tensor([[[100.0, 100, 300, 300], [400, 400, 700, 700]]])
    plain, crowd = (
        beside_truth(
            batch,
            Targets(boxes, torch.ones(1, 2).long(), torch.tensor([[True, hidden]]), torch.tensor([[False, hidden]])),
            detections,
            ["cell"],
        )
        for hidden in (False, True)
    )
    assert plain.shape == crowd.shape
    changed = np.argwhere((plain != crowd).any(-1))
    changed = changed[changed[:, 0] > plain.shape[0] - 800]  # below the titles
    gap = plain.shape[1] - 1600
    (top, left), (bottom, right) = changed.min(0), changed.max(0)
    head = plain.shape[0] - 800
    assert abs(top - head - 400) < 8 and abs(bottom - head - 700) < 8
    assert abs(left - 800 - gap - 400) < 8 and abs(right - 800 - gap - 700) < 8
    assert math.isclose(len(changed) / 300**2, 1 / 3, abs_tol=0.1)
