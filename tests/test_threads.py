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
from detector.threads import (
    Barrier,
    Number,
    Watch,
    cores,
    end_sharing,
    follow,
    idle,
    libgomp,
    number_varies,
    share_cores,
    times,
)


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
        monkeypatch.setattr("detector.runtime.share_cores", lambda by_number: None)
        start_ranks(Runtime(device="cpu"))
        assert torch.get_num_threads() == 3
        start_ranks(Runtime(device="cpu", threads=5))
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)


def test_threads_auto_lets_their_number_vary_unless_it_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr("detector.runtime.share_cores", lambda by_number: asked.append(by_number))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    start_ranks(Runtime(device="cpu", threads="auto"))
    start_ranks(Runtime(device="cpu", threads=torch.get_num_threads()))
    start_ranks(Runtime(device="cpu"))
    start_ranks(Runtime(device="cpu", threads="auto", compile=True))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)
    start_ranks(Runtime(device="cpu", threads="auto", deterministic=True))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    start_ranks(Runtime(device="cpu", threads="auto"))
    assert asked == [True, False, False, False, False, False]


class Seconds:
    """Seconds in which two threads run and wait for a core by turns of what is given, and others leave cores idle."""

    def __init__(self, way=None):
        self.way = way or SimpleNamespace(yielding=False, words="asleep", may_return=lambda idle: True)
        if way is None:
            self.way.give_way = lambda lost, seconds: setattr(self.way, "yielding", True)
            self.way.take_back = lambda: setattr(self.way, "yielding", False)
        self.watch, self.run, self.waited, self.idle = Watch(), 0, 0, 0
        self.watch.begin(self.way)

    def pass_by(self, run: float, waited: float, times: int = 1, idle: float | None = None) -> bool:
        for _ in range(times):
            self.run, self.waited = self.run + int(1e9 * run), self.waited + int(1e9 * waited)
            self.idle = None if idle is None else (self.idle or 0) + idle
            self.watch.see({"1": (self.run, self.waited), "2": (self.run, self.waited)}, self.idle)
        return self.way.yielding


def test_threads_give_way_where_others_use_the_machine_and_take_back_when_they_have_gone(caplog):
    caplog.set_level("INFO")
    second = Seconds()
    assert not second.pass_by(1, 0.001, 10)
    assert not second.pass_by(0.85, 0.1, 30)  # data workers of its own
    assert second.pass_by(0.55, 0.45) and "2 threads; 1.1 cores available" in caplog.text.replace(
        f"{torch.get_num_threads()} threads; {torch.get_num_threads() * 0.55:.1f}", "2 threads; 1.1"
    )
    assert second.pass_by(0.7, 0, 4) and second.pass_by(0.7, 0.15) and second.pass_by(0.7, 0, 4)  # not calm on end
    assert not second.pass_by(0.7, 0.1)
    assert second.pass_by(0.5, 0.5) and second.pass_by(0.7, 0, 9) and not second.pass_by(0.7, 0)  # twice as patient now
    assert not second.pass_by(1, 0, 20)
    assert second.pass_by(0.5, 0.5) and second.pass_by(0.7, 0, 4) and not second.pass_by(0.7, 0)  # as at first
    assert caplog.text.count("cores available") == 1


def test_fewer_threads_work_until_a_core_is_free():
    second = Seconds(Number(16))
    assert not second.pass_by(7, 0.6, 10, idle=0)  # a start
    second.way.followed = True
    assert not second.pass_by(8, 0.1, 10, idle=0)
    assert not second.pass_by(7, 0.6, idle=0) and not second.pass_by(8, 0.1, idle=0)  # a second alone
    assert not second.pass_by(7, 0.6, idle=0)
    assert second.pass_by(7, 0.6, idle=0) and second.way.wanted == 14
    assert second.pass_by(7, 0.3, idle=0) and second.way.wanted == 13
    assert second.pass_by(6.5, 0, 60, idle=0.5)  # nobody waits, yet there is nothing to take back
    assert second.pass_by(6.5, 0, 4, idle=3) and not second.pass_by(6.5, 0, idle=3) and second.way.wanted == 16
    second.pass_by(1, 9, 2, idle=0)
    assert second.way.wanted == 1
    assert not second.pass_by(0.5, 0, 30)  # where nobody knows what is idle, a try tells


def test_a_loop_follows_what_was_chosen_for_it(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        number, watch = Number(2), Watch()
        watch.begin(number)
        monkeypatch.setattr("detector.threads._watch", watch)
        follow()
        assert torch.get_num_threads() == 2
        number.give_way(0.7, seconds=2)
        follow()
        assert torch.get_num_threads() == 1
        number.take_back()
        follow()
        assert torch.get_num_threads() == 2
        number.give_way(0.7, seconds=2)
        follow()
        end_sharing()  # the next run of this process wants all threads, whatever the load
        assert torch.get_num_threads() == 2 and not number_varies()
        follow()
        assert torch.get_num_threads() == 2
        share_cores(by_number=True)
        assert number_varies() and watch.way.most == 2 and not watch.way.yielding and not watch.way.followed
    finally:
        torch.set_num_threads(before)


def test_a_process_that_does_nothing_decides_nothing():
    second = Seconds()
    assert not second.pass_by(0.01, 0.08, 3)
    assert second.pass_by(0.5, 0.5) and second.pass_by(0.01, 0, 30)


def test_threads_that_ended_take_nothing_away():
    second = Seconds()
    second.pass_by(50, 0)
    second.watch.see({"2": (int(50.5e9), int(0.5e9))})
    assert second.way.yielding


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
        barrier.give_way(1, 1)
        assert barrier.yielding
        asleep = taken()
        barrier.take_back()
        deadline = time.monotonic() + 30
        while any(thread.name == "idle threads" for thread in threading.enumerate()):
            assert time.monotonic() < deadline
        assert asleep < looking / 3 and asleep < taken() / 3
    finally:
        barrier.take_back()
        torch.set_num_threads(before)


def test_the_time_of_threads_is_read():
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("the system does not count it")
    before = sum(run for run, _ in times().values())
    end = time.thread_time() + 0.1
    while time.thread_time() < end:
        pass
    assert sum(run for run, _ in times().values()) - before > 5e7


def test_idle_seconds_are_those_of_the_cores_that_a_process_may_use(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 12}, raising=False)
    rows = ["cpu  9 9 9 999 9", "cpu0 1 1 1 500 0", "cpu1 1 1 1 200 100 3", "cpu12 1 1 1 600 0", "intr 5 5 5 5 5"]
    (tmp_path / "stat").write_text("\n".join(rows))
    assert idle(tmp_path / "stat") == 900 / os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text("cpu1 0 0 0 0 0\n")  # a sandbox that does not tell
    assert idle(tmp_path / "stat") is None and idle(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("threads", "variables", "by_number", "watched"),
    [
        (2, {}, False, True),
        (1, {}, False, False),
        (2, {"OMP_WAIT_POLICY": "ACTIVE"}, False, False),
        (2, {"GOMP_SPINCOUNT": "5"}, False, False),
        (2, {"GOMP_SPINCOUNT": "5"}, True, True),  # of another thing than how threads wait
        (1, {}, True, False),
    ],
)
def test_what_the_user_chose_stays(monkeypatch, threads, variables, by_number, watched):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr("detector.threads._look_on", started.append)
    monkeypatch.setattr("detector.threads._watch", None)
    monkeypatch.setattr("detector.threads.libgomp", lambda: SimpleNamespace())
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    share_cores(by_number)
    share_cores(by_number)
    assert len(started) == watched and all(isinstance(one.way, Number) == by_number for one in started)
