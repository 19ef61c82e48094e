"""Processes killed, disks full, pictures damaged, clocks wrong: what a run loses is at most what it did since its last
checkpoint, and the words say how to go on."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from tensorboard.compat.tensorflow_stub.io import gfile

from detector import checkpoint
from detector.config import RunError
from detector.engine import evaluation, faults, journal, run_folder, train
from detector.runtime import World
from detector.settings import Training
from tests.engine.test_resume import FULL, assert_same_run
from tests.runs import curve, forks

SLOWER = ["schedule.max_iterations=60", "runtime.checkpoint_every=2", "runtime.workers=1"]


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_torchrun_goes_on(program, two_ranks, tmp_path):
    """The other rank says what happened; the restarted ranks end with the weights of a run that was left alone."""
    settings = ["model.backbone.norm=frozen_batch_norm", "schedule.max_iterations=14", *SLOWER[1:]]
    whole = two_ranks(*settings, f"run_dir={tmp_path / 'whole'}")
    running = program(*settings, ranks=2, restarts=1)
    running.wait_for("6/14")
    ranks = [p for p in psutil.Process(running.process.pid).children() if "train.py" in " ".join(p.cmdline())]
    victim = next(p for p in ranks if p.environ()["LOCAL_RANK"] == "0")  # which holds the lock on the folder
    assert "Warning" not in running.output  # of libraries, DDP's of strides: in normal use there are none
    victim.kill()
    killed = time.monotonic()
    running.wait_for("another rank has ended")
    running.wait_for(f"continuing in {tmp_path / 'run'} after iteration")
    assert time.monotonic() - killed < 60
    assert running.end() == 0, running.output
    assert whole.end() == [0, 0]
    assert_same_run(whole.folder, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_worker_is_named_and_nothing_is_lost(program, tmp_path):
    running = program(*SLOWER)
    running.wait_for("4/60")
    workers = psutil.Process(running.process.pid).children(recursive=True)
    assert workers
    workers[-1].kill()
    assert running.end() == 1
    assert "error: rank 0: a data-loading process has died" in running.output
    assert "runtime.workers" in running.output and "Traceback" not in running.output
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iteration"] == max(curve(tmp_path / "run")) >= 4


def die_at(moment: str, cfg) -> None:
    """Train until the moment has come the second time; then the process kills itself as SIGKILL from outside would."""
    count = 0

    def before(owner, name: str, is_it=lambda *_: True) -> None:
        original = getattr(owner, name)

        def replaced(*args, **kwargs):
            nonlocal count
            if is_it(*args):
                count += 1
                if count == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, replaced)

    match moment:
        case "in a step":
            before(train, "update")
        case "in an evaluation":
            from detector.evaluation import evaluator

            before(evaluator, "detections_to_coco")
        case "after an evaluation":
            before(evaluation, "chosen")
        case "with half a checkpoint":
            before(os, "fsync")
        case "before best.pt":
            before(run_folder, "duplicate", lambda _, target: target.name == "best.pt")
        case "with half a log line":
            original = journal.Journal.write

            def write(self, line):
                nonlocal count
                count += 1
                if count == 2:
                    with open(self.path, "a") as file:
                        file.write('{"iteration": ')
                    os.kill(os.getpid(), signal.SIGKILL)
                original(self, line)

            journal.Journal.write = write
    train.train(cfg)


MOMENTS = ["in a step", "in an evaluation", "after an evaluation", "with half a checkpoint", "before best.pt"]


@pytest.mark.slow
def test_killed_at_the_worst_moments(run, config, tmp_path):
    common = [*FULL, "schedule.max_iterations=5", "runtime.checkpoint_every=1", "evaluation.every=2"]
    run(*common, f"run_dir={tmp_path / 'whole'}")
    for moment in [*MOMENTS, "with half a log line"]:
        cfg = config(*common, f"run_dir={tmp_path / moment.replace(' ', '_')}")
        process = forks().Process(target=die_at, args=(moment, cfg))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, moment
        train.train(cfg)
        assert_same_run(tmp_path / "whole", Path(cfg.run_dir))
        assert not list(Path(cfg.run_dir).glob(".*.tmp"))


# ---------------------------------------------------------------------------------------------------------------- disks


class FullDisk:
    """Files whose name ends in `name` can be opened for writing, but after `spare` times nothing fits any more."""

    def __init__(self, monkeypatch, name: str, spare: int):
        self.spare = spare
        original = builtins.open

        def opened(file, mode="r", *args, **kwargs):
            if str(file).endswith(name) and set(mode) & set("wa+"):
                self.spare -= 1
                file = file if self.spare >= 0 else "/dev/full"
            return original(file, mode, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("name", "spare", "done"),
    [("config.yaml", 0, None), ("log.jsonl", 3, 2), ("predictions.json.{}", 0, 4), ("metrics.json.{}", 0, 4)],
)
def test_full_disk(run, tmp_path, monkeypatch, name, spare, done):
    """Whatever file does not fit, the message says so, the checkpoint stays, and with room the run goes on."""
    common = [*FULL, "schedule.max_iterations=4", "runtime.checkpoint_every=1"]
    whole = run(*common, f"run_dir={tmp_path / 'whole'}")
    disk = FullDisk(monkeypatch, name.format(os.getpid()), spare)
    with pytest.raises(RunError, match=r"No space left on device.*MiB are free there.*[mM]ake room.*same command"):
        run(*common)
    assert done is None or checkpoint.load(tmp_path / "run" / "last.pt")["iteration"] == done
    disk.spare = 1000
    assert_same_run(whole, run(*common))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_under_tensorboard(run, tmp_path, monkeypatch):
    """Its events are written by a thread: what happens there is heard of too."""
    run("schedule.max_iterations=3")

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gfile.LocalFileSystem, "_write", refuse)
    with pytest.raises(RunError, match="No space left on device"):
        run("schedule.max_iterations=4", "runtime.tensorboard=true")
    assert checkpoint.load(tmp_path / "run" / "last.pt")["iteration"] == 3


@pytest.mark.slow
def test_a_disk_that_is_really_full(program, config, run, tmp_path):
    """A file system of 3 MiB in memory: the run stops with words, and ends as it should when there is room."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount file systems")
    try:
        common = [*FULL, "runtime.checkpoint_every=1", "runtime.tensorboard=true", "runtime.keep=20"]
        settings = [*common, f"run_dir={small / 'run'}"]
        stopped = program(*settings)
        assert stopped.end() == 1, stopped.output
        assert "error: " in stopped.output and "start the same command again" in stopped.output
        assert checkpoint.load(small / "run" / "last.pt")["iteration"] >= 1
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        again = forks().Process(target=train.train, args=(config(*settings),))  # lets go of its files at its end
        again.start()
        again.join(120)
        assert_same_run(run(*common), small / "run")
    finally:
        subprocess.run(["umount", str(small)], check=True)


# ------------------------------------------------------------------------------------------------------ data and clocks


def damaged_copy(shapes_tiny: Path, folder: Path) -> Path:
    """The data set with one training picture cut in half."""
    shutil.copytree(shapes_tiny, folder)
    victim = sorted((folder / "train").iterdir())[5]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return victim


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "mended"), [(0, True), (2, False)])
def test_a_damaged_picture_in_mid_epoch(run, shapes_tiny, tmp_path, workers, mended):
    """The run stops by the picture's name with all steps saved, and goes on with it mended or, if wished, without."""
    victim = damaged_copy(shapes_tiny, tmp_path / "data")
    common = [f"data.root={tmp_path / 'data'}", f"runtime.workers={workers}"]
    says = rf"image \S*{victim.name} cannot be read.*Mend it and go on with (\S+), or .*(data\.on_error=skip)"
    with pytest.raises(RunError, match=says) as error:
        run(*common)
    mend, skip = re.search(says, str(error.value)).groups()
    done = checkpoint.load(tmp_path / "run" / "last.pt")["iteration"]
    assert done == max(curve(tmp_path / "run"), default=0) < 6  # an epoch is six steps
    if mended:
        shutil.copy(shapes_tiny / "train" / victim.name, victim)
    run(*common, mend if mended else skip)
    assert list(curve(tmp_path / "run")) == list(range(1, 9))


def test_a_damaged_picture_in_an_evaluation(run, shapes_tiny, tmp_path):
    shutil.copytree(shapes_tiny, tmp_path / "data")
    victim = min((tmp_path / "data" / "val").iterdir())
    run(f"data.root={tmp_path / 'data'}", "schedule.max_iterations=3")
    victim.write_bytes(b"")
    # two pictures are looked at before training: the first is one of them
    with pytest.raises((RunError, ValueError), match=rf"image \S*{victim.name} cannot be read"):
        run(f"data.root={tmp_path / 'data'}", "schedule.max_iterations=4")


@pytest.mark.slow
def test_a_clock_that_jumps(run, tmp_path, monkeypatch):
    """The wall clock is shown, never used: days forwards and backwards change nothing."""
    common = [*FULL, "runtime.tensorboard=true", "evaluation.every=3", "runtime.checkpoint_every=2"]
    whole = run(*common, f"run_dir={tmp_path / 'whole'}")
    draw, now, now_ns = random.Random(0), time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + draw.uniform(-1e6, 1e6))
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + draw.randrange(-(10**15), 10**15))
    assert_same_run(whole, run(*common))
    lines = [line for line in record_lines(tmp_path / "run") if "images_per_second" in line]
    assert len(lines) == 9 and all(line["images_per_second"] > 0 for line in lines)


def record_lines(folder: Path) -> list[dict]:
    return [journal.parsed(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_other_errors_keep_their_tracebacks(tmp_path):
    """Only what the user can act on is put in plain words."""
    world, training = World(0, 1, torch.device("cpu")), Training()
    for error in (FileNotFoundError(errno.ENOENT, "x"), RuntimeError("shape mismatch"), RunError("words")):
        with pytest.raises(type(error)) as caught, faults.explain_errors(tmp_path, world, training):
            raise error
        assert caught.value is error
