"""The loop as its user sees it: what it learns, what it writes, what can be chosen."""

from __future__ import annotations

import json
import math

import hydra
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector import checkpoint
from detector.commands.train import train as train_command
from detector.config import CONFIGS, ConfigError, check
from detector.engine.train import train
from detector.evaluation import coco_metrics
from tests.runs import TINY, Program, curve

DEFORMABLE = ["roi=deformable", "model.box_head.roi.predictor_width=8", "model.mask_head.roi.predictor_width=8"]


@pytest.mark.slow
def test_what_a_run_leaves_behind(run, shapes_tiny):
    folder = run(
        *DEFORMABLE,
        "runtime.tensorboard=true",
        "runtime.log_every=2",
        "runtime.histograms_every=3",
        "runtime.pictures_every=4",
        "runtime.checkpoint_every=1 epoch",
        "evaluation.every=0.5",
    )
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "last.pt",
        "best.pt",
        "iteration_0000006.pt",
        "log.jsonl",
        "metrics.json",
        "config.yaml",
        "train.log",
    }

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {"bbox", "segm"}
    keys = {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}
    assert metrics["bbox"].keys() == metrics["segm"].keys() == keys

    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "metrics" not in line] == [1, 2, 4, 6, 8]
    assert [line["iteration"] for line in lines if "metrics" in line] == [4, 8]
    first = lines[0]
    terms = [key for key in first if key.startswith("loss_")]
    assert first["loss"] == pytest.approx(sum(first[key] for key in terms), rel=1e-5)
    assert {"loss_offset", "loss_mask", "loss_objectness"} <= set(terms)
    assert {"lr", "grad_norm", "images_per_second", "data_time", "memory_mb", "epoch", "positives"} <= set(first)
    assert first["epoch"] == pytest.approx(1 / 6, abs=1e-3)
    assert 0 <= first["data_time"] <= 1
    assert first["box_head/offsets_mean_abs"] <= first["box_head/offsets_max_abs"]

    board = EventAccumulator(str(folder / "tensorboard"), {"histograms": 0, "images": 0}).Reload()
    tags = board.Tags()
    assert {"loss/loss", "run/lr", "run/images_per_second", "run/grad_norm", "bbox/AP", "segm/AP50"} <= set(
        tags["scalars"]
    )
    assert [event.step for event in board.Scalars("loss/loss")] == [1, 2, 4, 6, 8]
    assert [event.step for event in board.Histograms("box_head/offsets")] == [4, 6]
    assert [event.step for event in board.Images("predictions/0")] == [4, 8]

    state = checkpoint.load(folder / "best.pt")
    assert state["best"]["value"] == max(line["metrics"]["segm"]["AP"] for line in lines if "metrics" in line)
    assert state["categories"] and len(state["categories"]) == len(state["category_ids"])
    assert state["config"] == yaml.safe_load((folder / "config.yaml").read_text())
    log = (folder / "train.log").read_text()
    assert "tensorboard --logdir" in log and "random" not in log


def test_layers_that_stay_random_are_named(run):
    folder = run("model.backbone.frozen_stages=2", "schedule.max_iterations=3")
    message = (folder / "train.log").read_text()
    assert "(conv1.weight, ...): they stay random. Give model.backbone.weights=" in message


@pytest.mark.slow
def test_it_learns(run):
    folder = run(
        "schedule.max_iterations=60", "optimizer=adamw", "optimizer.lr=2e-3", "runtime.log_every=10", "augment=none"
    )
    losses = [values["loss"] for values in curve(folder).values()]
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_close(run, tmp_path, precision):
    full = curve(run(f"run_dir={tmp_path / 'full'}"))
    low = curve(run(f"runtime.precision={precision}"))
    assert low[1]["loss"] == pytest.approx(full[1]["loss"], rel=0.03)
    assert low[1] != full[1]
    assert all(math.isfinite(values["loss"]) for values in low.values())


def test_fp16_scaler_lowers_its_scale_instead_of_stopping(run):
    """At the usual first scale of 65536 gradients overflow: no fault, but steps that are skipped until it fits."""
    folder = run("runtime.precision=fp16", "schedule.max_iterations=3")
    state = checkpoint.load(folder / "last.pt")
    assert state["scaler"]["scale"] < 65536
    assert state["nonfinite"] == 0
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[0]["grad_norm"] is None


@pytest.mark.parametrize(("override", "norm"), [("training.clip_norm=0.01", 0.01), ("training.clip_value=1e-6", None)])
def test_clipping(run, tmp_path, override, norm, monkeypatch):
    """What reaches the optimiser is clipped; what is logged is the norm before."""
    seen = []
    original = torch.optim.SGD.step

    def step(self, *args, **kwargs):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append((torch.nn.utils.get_total_norm(gradients).item(), max(g.abs().max().item() for g in gradients)))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    folder = run(override, "schedule.max_iterations=3")
    assert all(values["grad_norm"] > 0.1 for values in curve(folder).values())
    assert len(seen) == 3
    for total, largest in seen:
        assert total == pytest.approx(norm, rel=1e-3) if norm else largest <= 1e-6


def test_averaged_weights_are_what_is_evaluated_and_kept(run):
    folder = run("training.ema_decay=0.5", "schedule.max_iterations=4")
    state = checkpoint.load(folder / "last.pt")
    assert any(not torch.equal(state["ema"][key], state["model"][key]) for key in state["model"])
    assert state["ema"].keys() == state["model"].keys()


@pytest.mark.parametrize("model", ["rpn", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"])
def test_the_quickstart_with_another_model(model):
    """Its settings of the heads apply where the model has them."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", [f"model={model}"])
    check(cfg, train_command)
    assert cfg.model.box_head is None if model == "rpn" else cfg.model.box_head.batch_size_per_image == 64
    assert ("mask_head" in cfg.model) == ("mask" in model)
    if "mask" in model:
        assert cfg.model.mask_head.trunk.conv_channels == [64]
        assert cfg.model.mask_head._target_ == "detector.heads.MaskHead"


def test_the_quickstart_of_proposals_alone(shapes_tiny, tmp_path):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        small = ["schedule.max_iterations=2", "training.batch_size=2", "runtime.device=cpu", "runtime.workers=0"]
        small += [f"data.root={shapes_tiny}", f"run_dir={tmp_path}", "runtime.log_every=1", "evaluation.every=null"]
        cfg = hydra.compose("train", ["model=rpn", *small])
    check(cfg, train_command)
    train(cfg)
    losses = curve(tmp_path)[2]
    assert {key for key in losses if key.startswith("loss_")} == {"loss_objectness", "loss_rpn_box_reg"}
    assert json.loads((tmp_path / "metrics.json").read_text()).keys() == {"bbox"}


def test_a_schedule_that_does_not_fit_the_run_is_refused_by_name(run):
    with pytest.raises(ConfigError, match="schedule: warmup = 500: must be shorter than the run of 8 iterations"):
        run("schedule.warmup=500")


def test_a_checkpoint_of_another_model_is_refused(run):
    folder = run("schedule.max_iterations=3")
    state = checkpoint.load(folder / "last.pt")
    state["model"].pop("mask_head.predictor.mask_logits.weight")
    checkpoint.save(state, folder / "last.pt")
    with pytest.raises(ConfigError, match=r"(?s)does not fit the model.*mask_head\.predictor\.mask_logits"):
        run("schedule.max_iterations=4")


@pytest.mark.slow
def test_compiled_parts_learn_the_same(run, tmp_path, monkeypatch):
    """runtime.compile traces backbone, neck and RPN; here without a compiler's code, which takes minutes to make."""
    compiled, original = [], torch.nn.Module.compile

    def traced(self):
        compiled.append(type(self).__name__)
        original(self, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    few = ["schedule.max_iterations=3", "roi=deformable"]
    plain = curve(run(*few, f"run_dir={tmp_path / 'plain'}"))
    assert not compiled
    folder = run(*few, "runtime.compile=true")
    assert compiled == ["ResNet", "FPN", "RPNHead"]
    for iteration, values in curve(folder).items():
        assert values == pytest.approx(plain[iteration], rel=1e-3, abs=1e-5)
    names = checkpoint.load(tmp_path / "plain" / "last.pt")["model"].keys()
    assert checkpoint.load(folder / "last.pt")["model"].keys() == names


def test_metric_of_choice(run):
    folder = run("evaluation.metric=bbox.AR100", "schedule.max_iterations=3")
    best = checkpoint.load(folder / "best.pt")["best"]
    assert best == {
        "metric": "bbox.AR100",
        "value": json.loads((folder / "metrics.json").read_text())["bbox"]["AR100"],
        "iteration": 3,
    }
    with pytest.raises(ValueError, match=r"evaluation\.metric = 'keypoints\.AP': is not measured"):
        run("evaluation.metric=keypoints.AP", "schedule.max_iterations=3", "resume=none")


@pytest.mark.slow
def test_multirun_gives_every_job_its_folder(shapes_tiny, tmp_path):
    jobs = Program(
        ["-m", *TINY, "schedule.max_iterations=3", f"data.root={shapes_tiny}", "name=sweep", "seed=0,1"],
        folder=tmp_path,
    )
    assert jobs.end() == 0, jobs.output
    assert "Traceback" not in jobs.output
    folders = sorted((tmp_path / "runs").glob("sweep-*/"))
    assert len(folders) == 2
    states = [checkpoint.load(folder / "last.pt") for folder in folders]
    assert {state["config"]["seed"] for state in states} == {0, 1}


def test_metrics_are_those_of_the_evaluator(run, shapes_tiny):
    """The numbers in metrics.json come out again when the kept weights predict once more."""
    import detector
    from detector.data import build_dataset, build_loader
    from detector.evaluation.evaluator import evaluate

    folder = run("schedule.max_iterations=8", "optimizer=adamw", "optimizer.lr=2e-3")
    model = detector.load(folder / "last.pt")
    dataset = build_dataset(model.config["data"], "val", model.config["augment"])
    loader = build_loader(dataset, 4, 0, training=False, group_by_aspect=False)
    metrics, results = evaluate(model.model, loader, dataset, "cpu", per_class=False, progress=False)
    assert metrics == json.loads((folder / "metrics.json").read_text())
    file = shapes_tiny / "annotations" / "instances_val.json"
    assert coco_metrics(file, results, "segm")["AP"] == metrics["segm"]["AP"]
