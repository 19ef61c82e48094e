"""Several ranks: the same run as one, the same folder, the same decisions."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from detector import checkpoint, runtime
from detector.config import ConfigError, build
from detector.engine import setup
from detector.engine.state import Run
from detector.runtime import World
from detector.settings import Runtime
from tests.engine.test_resume import assert_same_run
from tests.runs import curve

# BatchNorm normalises over a rank's own images: the one thing that does depend on the number of ranks
SAME = ["model.backbone.norm=frozen_batch_norm", "schedule.max_iterations=5", "optimizer.lr=0.01"]


@pytest.mark.slow
def test_two_ranks_give_the_curve_of_one(two_ranks, run, tmp_path):
    """Losses, gradient norms and final weights; what remains is the order of float additions. Two parts learn only from
    the third iteration on: then the ranks exchange more gradients."""
    extra = ["roi=deformable", "model.box_head.roi.predictor_width=8", "model.mask_head.roi.predictor_width=8"]
    extra += ["training.freeze=[backbone,rpn]", "training.thaw_at=2"]
    two = two_ranks(*SAME, *extra, f"run_dir={tmp_path / 'two'}")
    one = run(*SAME, *extra, f"run_dir={tmp_path / 'one'}")
    assert two.end() == [0, 0]
    single, double = curve(one), curve(tmp_path / "two")
    assert list(single) == list(double) == [1, 2, 3, 4, 5]
    for iteration in single:
        assert double[iteration] == pytest.approx(single[iteration], rel=2e-3, abs=1e-5), iteration
        if iteration == 1:
            assert double[iteration] == pytest.approx(single[iteration], rel=1e-5, abs=1e-7)
    left, right = (checkpoint.load(folder / "last.pt") for folder in (one, tmp_path / "two"))
    for key, value in left["model"].items():
        torch.testing.assert_close(right["model"][key], value, rtol=1e-3, atol=1e-4)
    assert len(right["rng"]) == 2
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, tmp_path / "two")]
    assert metrics[0]["bbox"].keys() == metrics[1]["bbox"].keys()


@pytest.mark.slow
def test_ranks_stop_together_and_resume(two_ranks):
    """The signal reaches one of them."""
    running = two_ranks(*SAME, "schedule.max_iterations=400")
    log = running.folder / "log.jsonl"
    while not (log.exists() and len(curve(running.folder)) > 2):
        assert all(process.is_alive() for process in running.processes)
        time.sleep(0.1)
    running.processes[1].terminate()
    assert running.end() == [143, 143]
    state = checkpoint.load(running.folder / "last.pt")
    assert state["iteration"] == max(curve(running.folder)) >= 3
    said = (running.folder / "train.log").read_text()
    assert f"another rank was told to stop: saved after iteration {state['iteration']}; start again" in said
    last = state["iteration"] + 1
    assert two_ranks(*SAME, f"schedule.max_iterations={last}").end() == [0, 0]
    assert list(curve(running.folder)) == list(range(1, last + 1))


def test_a_batch_that_cannot_be_split_is_refused(config):
    cfg = config("training.batch_size=3")
    names = ("runtime", "training", "evaluation", "schedule")
    settings = [build(cfg[name], name) for name in names]
    world = World(0, 2, torch.device("cpu"))
    run = Run(cfg, *settings, world, Path(cfg.run_dir), *setup.datasets(cfg))
    with pytest.raises(ConfigError, match=r"training: batch_size=3 .* must be a multiple of world=2"):
        setup.loaders(run, 0)


def test_accumulation_is_a_larger_batch(run, tmp_path):
    """Each micro-batch is normalised by its own counts, so only losses that are means over images agree exactly."""
    folder = run(*SAME, "training.accumulate=2", "schedule.max_iterations=3")
    state = checkpoint.load(folder / "last.pt")
    assert state["sampler"]["position"] == 12
    whole = run(*SAME, "schedule.max_iterations=3", f"run_dir={tmp_path / 'whole'}")
    first, second = curve(folder)[1], curve(whole)[1]
    # RPN samples and normalises per image
    assert first["loss_objectness"] == pytest.approx(second["loss_objectness"], rel=1e-5)


@pytest.mark.slow
def test_same_seed_same_run_with_and_without_workers(run, tmp_path):
    runs = [run("augment=symmetry", f"runtime.workers={n}", f"run_dir={tmp_path / str(n)}") for n in (0, 2)]
    assert_same_run(*runs)
    other = run("augment=symmetry", "seed=1", f"run_dir={tmp_path / 'other'}")
    assert curve(other) != curve(runs[0])


@pytest.mark.slow
def test_deterministic_algorithms_suffice_and_agree(run, tmp_path):
    few = ["runtime.deterministic=true", "runtime.workers=2", "schedule.max_iterations=3", "roi=deformable"]
    try:
        runs = [run(*few, f"run_dir={tmp_path / name}") for name in ("a", "b")]
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(*runs)


def test_random_state_round_trip():
    runtime.seed_everything(3)
    state = runtime.random_state()
    first = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    runtime.set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first  # noqa: NPY002
    runtime.seed_everything(3)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first  # noqa: NPY002


def test_signals_become_requests_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with runtime.stop_on_signal() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        assert stop
        assert stop.exit_code == 143
        with pytest.raises(SystemExit) as end:
            list(stop.watch([1]))
        assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    with runtime.stop_on_signal():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_missing_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=r"runtime\.device = 'cuda': no CUDA device"):
        runtime.start_ranks(Runtime(device="cuda"))
