"""Checkpoint files: whole or not at all, never code, and clear words about what cannot be used."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from detector import checkpoint
from detector.checkpoint import CheckpointError
from detector.config import ConfigError, RunError
from detector.engine import run_folder


def state(iteration: int = 1, size: int = 10) -> dict:
    return {"iteration": iteration, "model": {"weight": torch.full((size,), float(iteration))}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    checkpoint.save(state(3), tmp_path / "a.pt")
    loaded = checkpoint.load(tmp_path / "a.pt")
    assert loaded["iteration"] == 3
    assert torch.equal(loaded["model"]["weight"], torch.full((10,), 3.0))
    assert loaded["versions"]["torch"] == str(torch.__version__)
    assert names(tmp_path) == ["a.pt"]


def test_keeps_the_newest_and_the_best(tmp_path):
    for i in range(1, 6):
        run_folder.publish(state(i), tmp_path, numbered=True, best=i == 2, keep=2)
    assert names(tmp_path) == ["best.pt", "iteration_0000004.pt", "iteration_0000005.pt", "last.pt"]
    assert [checkpoint.load(tmp_path / name)["iteration"] for name in names(tmp_path)] == [2, 4, 5, 5]


def test_names_survive_where_links_are_impossible(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    run_folder.publish(state(4), tmp_path, numbered=True, best=True, keep=1)
    assert [checkpoint.load(tmp_path / name)["iteration"] for name in names(tmp_path)] == [4, 4, 4]


def write_under_a_limit(folder: Path, answers) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        checkpoint.save(state(2, size=1_000_000), folder / "last.pt")
    except RunError as error:
        answers.put(str(error))


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """A limit on the size of files stands for the full disk: write() fails in the middle."""
    checkpoint.save(state(1), tmp_path / "last.pt")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=write_under_a_limit, args=(tmp_path, answers))
    process.start()
    message = answers.get(timeout=60)
    process.join()
    assert "last.pt could not be written" in message
    assert "previous checkpoint is intact: make room" in message
    assert names(tmp_path) == ["last.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["iteration"] == 1


def write_for_ever(folder: Path) -> None:
    i = 1
    while True:
        i += 1
        run_folder.publish(state(i, size=300_000), folder, numbered=True, best=True, keep=2)


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.11])
def test_killed_while_writing(tmp_path, delay):
    run_folder.publish(state(1, size=300_000), tmp_path, numbered=True, best=True, keep=2)
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
    process.start()
    time.sleep(delay)
    process.kill()
    process.join()
    for path in tmp_path.glob("[!.]*.pt"):
        assert checkpoint.load(path)["model"]["weight"].numel() == 300_000
    with run_folder.locked(tmp_path):
        assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated(tmp_path, share):
    checkpoint.save(state(), tmp_path / "last.pt")
    data = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(data[: int(share * len(data))])
    with pytest.raises(CheckpointError, match=r"last\.pt: not readable as a checkpoint"):
        checkpoint.load(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be read; resume=none"):
        run_folder.find("auto", tmp_path)


def test_newest_intact_one_is_found(tmp_path, caplog):
    for i in (1, 2, 3):
        run_folder.publish(state(i), tmp_path, numbered=True, best=i == 1, keep=2)
    (tmp_path / "last.pt").unlink()
    assert run_folder.find("auto", tmp_path)["iteration"] == 3
    for name in ("last.pt", "iteration_0000003.pt"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert run_folder.find("auto", tmp_path)["iteration"] == 2
    assert "last.pt: not readable" in caplog.text
    assert "iteration_0000002.pt, iteration 2, instead" in caplog.text
    assert run_folder.find("none", tmp_path) is None
    assert run_folder.find(str(tmp_path / "best.pt"), tmp_path)["iteration"] == 1


def test_missing_path_lists_what_is_there(tmp_path):
    checkpoint.save(state(), tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"bset\.pt: there is no such checkpoint \(in its folder: best\.pt\)"):
        run_folder.find(str(tmp_path / "bset.pt"), tmp_path)


def test_a_folder_offers_its_checkpoints(tmp_path):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"a: is a folder, without a best\.pt or last\.pt"):
        checkpoint.load(run)
    checkpoint.save(state(), run / "best.pt")
    for folder in (run, tmp_path / "runs"):
        with pytest.raises(CheckpointError, match=r": is a folder; take (\S*best\.pt)$") as error:
            checkpoint.load(folder)
        assert checkpoint.load(str(error.value).rpartition(" ")[2])["iteration"] == state()["iteration"]


def test_foreign_files_are_named(tmp_path):
    torch.save({"backbone.conv1.weight": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of this project \(it holds: backbone.conv1.weight\)"):
        checkpoint.load(tmp_path / "foreign.pt")


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path(os.environ["ATTACKED"]),))


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTACKED", str(tmp_path / "attacked"))
    torch.save({**state(), "format": checkpoint.FORMAT, "extra": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"evil\.pt: not readable"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "attacked").exists()


def hold(folder: Path, ready, leave) -> None:
    with run_folder.locked(folder):
        ready.set()
        leave.wait()


def test_a_folder_in_use_is_refused_by_name_and_freed_by_death(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, leave = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, leave))
    process.start()
    assert ready.wait(60)
    with pytest.raises(RunError, match=f"is in use by process {process.pid} on "), run_folder.locked(tmp_path):
        pass
    process.kill()
    process.join()
    with run_folder.locked(tmp_path):
        pass


def lock_and_fork(folder: Path, ready) -> None:
    with run_folder.locked(folder):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
        child.start()
        ready.put(child.pid)
        child.join()


def test_workers_do_not_keep_the_lock_of_a_killed_process(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.SimpleQueue()
    process = context.Process(target=lock_and_fork, args=(tmp_path, ready))
    process.start()
    worker = ready.get()
    process.kill()
    process.join()
    with run_folder.locked(tmp_path):  # the worker is still there
        os.kill(worker, signal.SIGKILL)


def test_another_programs_error_is_not_taken_for_a_full_disk(tmp_path):
    """torch raises a RuntimeError wherever the main process is when a data-loading worker has died."""

    def write(file):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        checkpoint.atomically(tmp_path / "last.pt", write)
    assert not isinstance(caught.value, RunError)
    assert names(tmp_path) == []


def test_a_dead_worker_is_told_of_after_the_file_is_whole(tmp_path):
    """torch's zip writer, torn off in the middle, blames the file, or aborts the process."""

    def killed(number, frame):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    def write(file):
        file.write(b"half ")
        os.kill(os.getpid(), signal.SIGCHLD)
        file.write(b"and half")

    previous = signal.signal(signal.SIGCHLD, killed)
    try:
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            checkpoint.atomically(tmp_path / "last.pt", write)
        assert signal.getsignal(signal.SIGCHLD) is killed
    finally:
        signal.signal(signal.SIGCHLD, previous)
    assert (tmp_path / "last.pt").read_bytes() == b"half and half"


def test_keys_that_are_newer_than_the_checkpoint(caplog):
    old = {"data": {"root": "a", "train": {"annotations": "x"}}, "model": {"neck": {"channels": [1]}}, "optimizer": {}}
    new = {**old, "data": {**old["data"], "brightness": 2, "cache": "here"}}
    run_folder.compare_configs(old, new)
    assert "data.brightness: absent -> 2" in caplog.text
    with pytest.raises(ConfigError, match=r"data\.brightness: absent -> 2"):
        run_folder.compare_configs(old, new, chosen={"data.brightness"})
    for other in (
        {**old, "optimizer": {"fused": True}},
        {**old, "model": {"neck": {"channels": [1, 2]}}},
        {**old, "model": {**old["model"], "mask_head": {"size": 14}}},
        {**new, "data": {**new["data"], "root": "b", "train": {"annotations": "y"}}},
    ):
        with pytest.raises(ConfigError, match="another configuration"):
            run_folder.compare_configs(old, other)


def test_compare_configs(caplog):
    old = {"seed": 0, "optimizer": {"lr": 0.1}, "schedule": {"max_iterations": 5, "m": [1]}, "runtime": {"workers": 2}}
    run_folder.compare_configs(old, {**old, "runtime": {"workers": 0}, "name": "x"})
    assert not caplog.text
    run_folder.compare_configs(old, {**old, "schedule": {"max_iterations": 9, "m": [1, 2]}})
    assert "schedule.max_iterations: 5 -> 9" in caplog.text
    assert "schedule.m.1: absent -> 2" in caplog.text
    run_folder.compare_configs({**old, "data": {"root": "a"}}, {**old, "data": {"root": "b"}})
    assert "data.root: a -> b" in caplog.text
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.1 -> 0\.2; seed: 0 -> 1"):
        run_folder.compare_configs(old, {**old, "seed": 1, "optimizer": {"lr": 0.2}})
