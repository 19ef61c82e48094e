"""A grid of runs: what is done with finished, interrupted and failing ones, and that the methods start equal."""

from __future__ import annotations

import json
import math
import mmap
import signal
import sys

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from detector import runtime
from detector.commands import evaluate
from detector.config import as_program, build
from detector.config.multirun import Job, Multirun
from detector.config.trials import is_hopeless
from detector.engine.journal import forget_peak, memory_mb
from tests.runs import TINY, Program, curve

METHODS = ("pool", "align", "align_max", "deformable", "modulated_deformable")


@pytest.mark.slow
def test_finished_interrupted_and_failing_jobs(shapes_tiny, tmp_path):
    """The first start is stopped in its second job; the second meets jobs of every kind, failing ones in between."""
    common = ["-m", *TINY, "schedule.max_iterations=12", f"data.root={shapes_tiny}", "run_dir=runs/grid/${seed}"]
    first = Program([*common, "seed=0,1,2"], folder=tmp_path)
    first.wait_for("training into runs/grid/1")
    assert first.stop(signal.SIGTERM) == 128 + signal.SIGTERM, first.output
    grid = tmp_path / "runs" / "grid"
    assert "2 jobs: 1 done, 1 stopped" in first.output
    assert (grid / "0" / "metrics.json").exists() and not (grid / "1" / "metrics.json").exists()
    assert (grid / "1" / "last.pt").exists() and not (grid / "2").exists()
    before = (grid / "0" / "last.pt").stat().st_mtime_ns

    (grid / "3" / "log.jsonl").mkdir(parents=True)  # an error that nobody has thought of
    second = Program([*common, "seed=-1,0,3,1,2"], folder=tmp_path)
    assert second.end() == 1, second.output
    jobs = json.loads((grid / "multirun.json").read_text())
    assert [job["state"] for job in jobs] == ["failed", "finished before", "failed", "resumed", "done"]
    assert jobs[0]["reason"] == "seed = -1: must be at least 0" and jobs[2]["reason"].startswith("IsADirectoryError")
    assert second.output.count("Traceback") == 1  # a wrong setting needs none
    assert jobs[3]["folder"] == "runs/grid/1" and "seed=1" in jobs[3]["overrides"]
    assert all(0 <= jobs[i]["value"] <= 1 for i in (1, 3, 4)) and jobs[0]["value"] is None
    assert (grid / "0" / "last.pt").stat().st_mtime_ns == before
    assert all((grid / seed / "metrics.json").exists() for seed in "012")
    assert "5 jobs: 1 finished before, 1 done, 1 resumed, 2 failed" in second.output
    assert "failed           runs/grid/-1  seed = -1: must be at least 0" in second.output


@pytest.mark.parametrize("asked", ["-m", "--multirun", "--multi", "hydra.mode=MULTIRUN"])
def test_a_multirun_however_it_is_asked_for(call, tmp_path, asked):
    """Paths between commas are several, and the jobs are recorded."""
    paths = f"checkpoint={tmp_path / 'gone.pt'},{tmp_path / 'lost.pt'}"
    code, shown, errors = call(evaluate.main, asked, paths, "device=cpu", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert code == 1 and "2 jobs: 2 failed" in shown
    assert all(f"{name}: there is no such checkpoint" in errors for name in ("gone.pt", "lost.pt"))
    assert not list((tmp_path / "sweep").glob("jobs-*"))


def test_a_finished_run_that_trains_on_is_no_skipped_one(tmp_path):
    """A longer schedule: the folder is that of a finished run, but the job adds to it."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("last.pt", "metrics.json", "log.jsonl"):
        (folder / name).write_text("{}\n")
    multirun = Multirun()
    multirun.open(tmp_path / "sweep")
    with multirun.job(0, ["seed=0"], str(folder), ()):
        pass
    with multirun.job(1, ["seed=0"], str(folder), ()):
        (folder / "metrics.json").write_text("{}\n{}\n")
        (folder / "log.jsonl").write_text("{}\n{}\n")
    assert [job.state for job in multirun.jobs] == ["finished before", "resumed"] and not multirun.failed


def test_a_job_whose_process_was_killed_is_lost(tmp_path, capsys):
    multirun = Multirun()
    multirun.open(tmp_path / "sweep")
    multirun.write(0, Job(["seed=0"], str(tmp_path / "runs" / "0")))  # all that such a job leaves
    assert multirun.failed
    multirun.report()
    assert "1 jobs: 1 lost" in capsys.readouterr().out and not list((tmp_path / "sweep").iterdir())
    assert json.loads((tmp_path / "runs" / "multirun.json").read_text())[0]["state"] == "lost"


def test_the_summary_names_its_metric_in_percent(tmp_path, capsys):
    multirun = Multirun()
    multirun.open(tmp_path / "sweep")
    for number, (metric, value) in enumerate([("auto", 0.5123), ("bbox.AP50", 0.25), ("auto", 0.4), (None, None)]):
        folder = tmp_path / "runs" / f"grid_a-seed=-{number}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text('{"bbox": {}, "segm": {}}' if number == 0 else '{"bbox": {}}')
        with multirun.job(number, [f"seed={number}"], str(folder), ()) as job:
            job.value, job.metric = value, metric
    multirun.report()
    lines = [line.split("  ", 3)[-1].strip() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line.rpartition("seed=-")[2] for line in lines] == [
        "0  mask AP 51.2 %",
        "1  box AP50 25.0 %",
        "2  box AP 40.0 %",
        "3",
    ]
    (file,) = (tmp_path / "runs").glob("*.json")
    assert file.name == "grid_a-multirun.json" and json.loads(file.read_text())[1]["metric"] == "bbox.AP50"


def test_a_single_run_reports_nothing(capsys):
    Multirun().report()
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's peak can only be reset on Linux")
def test_each_run_of_a_process_has_its_own_peak_of_memory():
    forget_peak(torch.device("cpu"))
    before = memory_mb(torch.device("cpu"))
    with mmap.mmap(-1, 300 * 2**20) as block:  # new memory, where a tensor may get some that is in use already
        for _ in range(300):
            block.write(bytes(2**20))
    large = memory_mb(torch.device("cpu"))
    assert large > before + 250 and memory_mb(torch.device("cpu")) == pytest.approx(large, abs=20)
    forget_peak(torch.device("cpu"))
    assert memory_mb(torch.device("cpu")) < before + 100


def test_methods_start_with_the_same_weights(config):
    """Whatever two models have in common is equal, the random offset predictors of one notwithstanding."""
    states = {}
    for roi in METHODS:
        runtime.seed_everything(3)
        states[roi] = build(config(f"roi={roi}").model, "model", num_classes=5).state_dict()
    common = set(states["pool"])
    assert common == set(states["align"]) and any("mask_head.predictor" in key for key in common)
    for roi, state in states.items():
        own = set(state) - common
        assert common <= set(state) and all(".op.offset_predictor." in key for key in own), roi
        assert bool(own) == ("deformable" in roi)
        assert [key for key in common if not torch.equal(state[key], states["pool"][key])] == []
    first, second = (
        states["deformable"][f"{head}.extractor.op.offset_predictor.0.offsets.2.weight"]
        for head in ("box_head", "mask_head")
    )
    assert not torch.equal(first, second)  # heads do not get the same random numbers


@pytest.mark.slow
def test_methods_see_the_same_samples_in_the_same_order(run, tmp_path):
    """Without learning, the RPN's losses of every step are a fingerprint of its images and their augmentation."""
    still = ["optimizer.lr=0.0", "augment=symmetry", "training.clip_norm=null"]
    curves = {
        roi: curve(run(*still, f"roi={roi}", f"run_dir={tmp_path / roi}")) for roi in ("pool", "align", "deformable")
    }
    rpn = {
        roi: [(line["loss_objectness"], line["loss_rpn_box_reg"]) for line in lines.values()]
        for roi, lines in curves.items()
    }
    assert rpn["pool"] == rpn["align"] == rpn["deformable"] and len(set(rpn["pool"])) == 8
    # deformable pooling with offsets of zero is RoI Align, on the same RoIs
    for a, b in zip(curves["align"].values(), curves["deformable"].values()):
        assert a["loss_classifier"] == pytest.approx(b["loss_classifier"], rel=1e-5)
        assert a["loss_mask"] == pytest.approx(b["loss_mask"], rel=1e-5)
    other = curve(run(*still, "seed=1", f"run_dir={tmp_path / 'other'}"))
    assert other[1]["loss_objectness"] != curves["align"][1]["loss_objectness"]


@pytest.mark.slow
def test_optuna_searches_and_prunes(tmp_path, monkeypatch, capsys):
    """Trials whose metric is below the median of the finished ones at the same iteration end there."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    ended: dict[float, int] = {}

    def trial(**settings) -> float:
        lr = settings["optimizer"]["lr"]
        value = 0.0
        for iteration in (1, 2, 3):
            value = 0.1 * iteration - abs(math.log10(lr) + 3)
            ended[lr] = iteration
            if is_hopeless(value, iteration):
                break
        return value

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    sweep = ["hydra/sweeper=optuna_pruning", "hydra.sweeper.n_trials=9", "hydra.sweeper.sampler.seed=1"]
    space = "optimizer.lr=tag(log,interval(1e-5,1e-1))"
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *sweep, "hydra.sweep.dir=sweep", space])
    as_program("train", trial, "")()
    capsys.readouterr()
    assert len(ended) == 9 and set(list(ended.values())[:5]) == {3}  # the median is that of five trials at least
    assert 1 in ended.values() and list(ended.values())[5:].count(3) > 0
    found = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    best = min(ended, key=lambda lr: abs(math.log10(lr) + 3))
    assert found.best_params["optimizer.lr"] == best and ended[best] == 3
    assert not is_hopeless(0.0, 4)  # no job of a sweep


def test_a_trial_that_is_given_up_ends_with_its_results(run, monkeypatch):
    told = []

    def is_worse(value: float, iteration: int) -> bool:
        told.append(iteration)
        return iteration == 4

    monkeypatch.setattr("detector.engine.evaluation.is_hopeless", is_worse)
    folder = run("evaluation.every=2")
    assert told == [2, 4] and list(curve(folder)) == [1, 2, 3, 4]
    assert {"bbox", "segm"} <= set(json.loads((folder / "metrics.json").read_text()))
    assert "gives this trial up after iteration 4" in (folder / "train.log").read_text()
