"""How many CPU threads a program has, and how they wait for each other."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detector.runtime import start_ranks
from detector.settings import Runtime
from detector.threads import Barrier, Watch, cores, libgomp, share_cores, times


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cores_of_a_container(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == (expected or 64)


def test_no_more_threads_than_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr("detector.runtime.cores", lambda: 3)
        monkeypatch.setattr("detector.runtime.share_cores", lambda: None)
        start_ranks(Runtime(device="cpu"))
        assert torch.get_num_threads() == 3
        start_ranks(Runtime(device="cpu", threads=5))
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)


class Seconds:
    """Seconds in which two threads run and wait for a core by turns of what is given."""

    def __init__(self):
        self.barrier = SimpleNamespace(asleep=False)
        self.barrier.sleep = lambda: setattr(self.barrier, "asleep", True)
        self.barrier.look = lambda: setattr(self.barrier, "asleep", False)
        self.watch, self.run, self.waited = Watch(self.barrier), 0, 0

    def pass_by(self, run: float, waited: float, times: int = 1) -> bool:
        for _ in range(times):
            self.run, self.waited = self.run + int(1e9 * run), self.waited + int(1e9 * waited)
            self.watch.see({"1": (self.run, self.waited), "2": (self.run, self.waited)})
        return self.barrier.asleep


def test_threads_sleep_where_others_use_the_machine_and_look_again_when_they_have_gone(caplog):
    caplog.set_level("INFO")
    second = Seconds()
    assert not second.pass_by(1, 0.001, 10)
    assert second.pass_by(0.55, 0.45) and "2 threads; 1.1 cores available" in caplog.text.replace(
        f"{torch.get_num_threads()} threads; {torch.get_num_threads() * 0.55:.1f}", "2 threads; 1.1"
    )
    assert second.pass_by(0.7, 0, 4) and second.pass_by(0.7, 0.1) and second.pass_by(0.7, 0, 4)  # not calm on end
    assert not second.pass_by(0.7, 0)
    assert second.pass_by(0.5, 0.5) and second.pass_by(0.7, 0, 9) and not second.pass_by(0.7, 0)  # twice as patient now
    assert not second.pass_by(1, 0, 20)
    assert second.pass_by(0.5, 0.5) and second.pass_by(0.7, 0, 4) and not second.pass_by(0.7, 0)  # as at first
    assert caplog.text.count("cores available") == 1


def test_a_process_that_does_nothing_decides_nothing():
    second = Seconds()
    assert not second.pass_by(0.01, 0.08, 3)
    assert second.pass_by(0.5, 0.5) and second.pass_by(0.01, 0, 30)


def test_threads_that_ended_take_nothing_away():
    second = Seconds()
    second.pass_by(50, 0)
    second.watch.see({"2": (int(50.5e9), int(0.5e9))})
    assert second.barrier.asleep


@pytest.mark.skipif(libgomp() is None, reason="threads are not libgomp's")
@pytest.mark.skipif(any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")), reason="chosen")
def test_sleeping_threads_take_no_time(monkeypatch):
    """Two milliseconds after a parallel region the others still look for the next one, unless they sleep."""
    before, barrier = torch.get_num_threads(), Barrier(libgomp())
    values = torch.ones(200_000)

    def taken() -> float:
        """CPU seconds of all other threads."""
        own, start = time.thread_time(), time.process_time()
        for _ in range(100):
            values.sum()
            time.sleep(0.002)
        return time.process_time() - start - (time.thread_time() - own)

    torch.set_num_threads(2)
    try:
        taken()
        looking = taken()
        barrier.sleep()
        assert barrier.asleep
        asleep = taken()
        barrier.look()
        deadline = time.monotonic() + 30
        while any(thread.name == "idle threads" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
        assert asleep < looking / 3 and asleep < taken() / 3
    finally:
        barrier.look()
        torch.set_num_threads(before)


def test_the_time_of_threads_is_read():
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("the system does not count it")
    before = sum(run for run, _ in times().values())
    end = time.thread_time() + 0.1
    while time.thread_time() < end:
        pass
    assert sum(run for run, _ in times().values()) - before > 5e7


@pytest.mark.parametrize(
    ("threads", "variables", "watched"),
    [(2, {}, True), (1, {}, False), (2, {"OMP_WAIT_POLICY": "ACTIVE"}, False), (2, {"GOMP_SPINCOUNT": "5"}, False)],
)
def test_what_the_user_chose_stays(monkeypatch, threads, variables, watched):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr("detector.threads._watch", started.append)
    monkeypatch.setattr("detector.threads._watching", threading.Lock())
    monkeypatch.setattr("detector.threads.libgomp", lambda: SimpleNamespace())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    share_cores()
    share_cores()
    assert len(started) == watched
