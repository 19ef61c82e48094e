"""An interrupted run ends with the losses and weights of the undisturbed one, to the bit."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from detector import checkpoint
from detector.config import ConfigError
from detector.engine.train import train
from tests.runs import curve, forks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last.pt")["model"]


def assert_same_run(a: Path, b: Path) -> None:
    assert curve(a) == curve(b)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


FULL = ["training.ema_decay=0.9", "optimizer=adamw", "optimizer.lr=1e-3", "augment=symmetry"]
FULL += ["schedule.max_iterations=9"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_continues_in_mid_epoch_to_the_bit(run, tmp_path, optimizer):
    """Six iterations make an epoch; the run is cut after iteration 4, with log lines every third iteration."""
    common = [*FULL, f"optimizer={optimizer}", "runtime.log_every=3", "runtime.checkpoint_every=2"]
    whole = run(*common, f"run_dir={tmp_path / 'whole'}")
    part = run(*common, f"run_dir={tmp_path / 'part'}")
    for name in ("last.pt", "best.pt", "iteration_0000006.pt", "iteration_0000008.pt"):
        (part / name).unlink()
    state = checkpoint.load(whole / "iteration_0000006.pt")
    checkpoint.save({k: v for k, v in state.items() if k not in ("format", "versions")}, part / "last.pt")
    run(*common, f"run_dir={part}")
    assert_same_run(whole, part)
    assert set(curve(part)) == {1, 2, 3, 6, 9}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_moments(run, config, tmp_path, number):
    """Killed wherever it happens to be: in a step, while a checkpoint is written, in an evaluation."""
    common = [*FULL, "runtime.checkpoint_every=1", "evaluation.every=2", "runtime.workers=1"]
    run(*common, f"run_dir={tmp_path / 'whole'}")
    cfg = config(*common, f"run_dir={tmp_path / 'part'}")
    seed = random.randrange(1000)
    draw, codes = random.Random(seed), []
    while 0 not in codes:
        process = forks().Process(target=train, args=(cfg,))
        process.start()
        if len(codes) < 4:
            time.sleep(draw.uniform(0.1, 1.5))
            os.kill(process.pid, number)
        process.join(120)
        codes.append(process.exitcode)
    # SIGTERM before the loop listens ends the program as it does any other
    assert set(codes) <= {0, -number, 128 + number}, (seed, codes)
    assert_same_run(tmp_path / "whole", tmp_path / "part")


@pytest.mark.slow
def test_sigterm_saves_the_step_at_hand(program, tmp_path):
    running = program("schedule.max_iterations=500")
    running.wait_for("3/500")
    assert running.stop(signal.SIGTERM) == 143, running.output
    assert "saved after iteration" in running.output
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["iteration"] == max(curve(tmp_path / "run")) >= 3
    assert state["sampler"]["position"] == 4 * state["iteration"]


def test_truncated_last_checkpoint_falls_back(run, tmp_path, caplog):
    folder = run("runtime.checkpoint_every=3")
    before = curve(folder)
    state = checkpoint.load(folder / "iteration_0000006.pt")
    data = (folder / "last.pt").read_bytes()
    (folder / "best.pt").unlink()
    (folder / "last.pt").unlink()
    (folder / "last.pt").write_bytes(data[: len(data) // 2])
    run("runtime.checkpoint_every=3")
    text = (folder / "train.log").read_text()
    assert "last.pt: not readable as a checkpoint" in text
    assert f"iteration_0000006.pt, iteration {state['iteration']}, instead" in text
    assert curve(folder) == before


def test_finished_run_says_so(run, tmp_path):
    folder = run()
    stamp = os.stat(folder / "last.pt").st_mtime_ns
    run()
    assert "is finished: 8 iterations" in (folder / "train.log").read_text()
    assert os.stat(folder / "last.pt").st_mtime_ns == stamp


def test_longer_schedule_goes_on(run):
    folder = run("schedule.max_iterations=4")
    run("schedule.max_iterations=6")
    assert list(curve(folder)) == [1, 2, 3, 4, 5, 6]
    assert "schedule.max_iterations: 4 -> 6" in (folder / "train.log").read_text()


@pytest.mark.parametrize("override", ["seed=1", "optimizer.lr=0.5", "model.box_head.beta=0.5", "training.batch_size=2"])
def test_another_configuration_is_refused_by_key(run, override):
    run("schedule.max_iterations=2", "schedule.warmup=0")
    with pytest.raises(ValueError, match=f"another configuration.*{override.split('=')[0]}: .* -> "):
        run("schedule.max_iterations=2", "schedule.warmup=0", override)


def change_annotations(root: Path) -> None:
    file = root / "annotations" / "instances_train.json"
    file.write_text(file.read_text(encoding="utf-8") + " ", encoding="utf-8")


def change_a_picture(root: Path) -> None:
    file = max((root / "val").iterdir())
    file.write_bytes(file.read_bytes() + b"more")


def change_no_size(root: Path) -> None:
    file = max((root / "val").iterdir())
    held = bytearray(file.read_bytes())
    held[-3] ^= 1  # of the last coefficients
    file.write_bytes(held)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_no_size, r"data\.val\.images: 1 of 8 files in \S*val \(000007\.jpg: another content\)"),
        (change_annotations, r"data\.train\.annotations: the content of \S*instances_train\.json"),
        (change_a_picture, r"data\.val\.images: 1 of 8 files in \S*val \(000007\.jpg: \d+ bytes, now \d+ bytes\)"),
    ],
)
def test_data_that_changed_since_the_run_began_are_refused_by_name(run, shapes_tiny, tmp_path, change, message):
    """Copies elsewhere are the same data. Each way out that the message names is one."""
    root, other = tmp_path / "data", tmp_path / "moved"
    shutil.copytree(shapes_tiny, root)
    short = ["schedule.warmup=0", "training.batch_size=2", "evaluation.batch_size=8"]
    folder = run(*short, f"data.root={root}", "schedule.max_iterations=1")
    shutil.copytree(root, other)  # with new times of change
    longer = [*short, f"data.root={other}", "schedule.max_iterations=2"]
    change(other)
    with pytest.raises(ConfigError, match=f"changed since it began: {message}") as error:
        run(*longer)
    [way_on] = re.findall(r"resume=(\S+) to go on", str(error.value))
    run(*longer, f"resume={way_on}")
    assert list(curve(folder)) == [1, 2] and "changed since the run began: data." in (folder / "train.log").read_text()
    run(*longer)  # the checkpoint knows the change now
    run(*short, f"data.root={root}", "schedule.max_iterations=1", "resume=none")
    run(*longer, f"run_dir={tmp_path / 'another'}")


def test_checkpoints_that_do_not_know_their_data_go_on(run, shapes_tiny, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes_tiny, root)
    options = [f"data.root={root}", "schedule.warmup=0"]
    folder = run(*options, "schedule.max_iterations=1")
    older = {key: value for key, value in checkpoint.load(folder / "last.pt").items() if key != "contents"}
    checkpoint.save(older, folder / "last.pt")
    change_annotations(root)
    run(*options, "schedule.max_iterations=2")
    assert list(curve(folder)) == [1, 2] and "contents" in checkpoint.load(folder / "last.pt")


def test_resume_none_starts_anew_and_a_path_continues_elsewhere(run, tmp_path):
    folder = run("schedule.max_iterations=3")
    run("schedule.max_iterations=3", "resume=none")
    assert list(curve(folder)) == [1, 2, 3]
    other = run("schedule.max_iterations=5", f"resume={folder / 'last.pt'}", f"run_dir={tmp_path / 'other'}")
    assert list(curve(other)) == [4, 5]
