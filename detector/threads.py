"""The cores that a process may use, and how its threads wait for each other where others use them too."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import re
import threading
import time
from pathlib import Path

import torch

log = logging.getLogger(__name__)

CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # by which a user says how threads wait
CROWDED, CALM = 0.05, 0.02  # of the time in which threads could run, spent waiting for a core
PATIENCE, LONGEST = 5, 300  # calm seconds after which threads look again, at first and at most


def cores(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """How many cores this process may keep busy: of its affinity, and of the quota of its container, rounded up."""
    allowed = allowed_cores()
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of version 2, of version 1
        try:
            quota, period = " ".join((groups / name).read_text(encoding="ascii") for name in names).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    return allowed


def allowed_cores() -> int:
    """The cores of this process's affinity, which libgomp counts; all of them where the system has no such thing."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def times(tasks: Path = Path("/proc/self/task")) -> dict[str, tuple[int, int]]:
    """thread -> nanoseconds that it has run, and that it has waited for a core, where the system counts them."""
    found = {}
    for task in tasks.iterdir():
        try:
            run, waited = (task / "schedstat").read_text(encoding="ascii").split()[:2]
        except (OSError, ValueError):  # it has ended, or ends
            continue
        found[task.name] = int(run), int(waited)
    return found


class Barrier:
    """How OpenMP's threads wait at the end of a parallel region: `asleep`, or looking for the others all the time.

    Looking is fastest on cores of one's own. Where one thread has no core for the moment the others look for it in
    vain, on cores that it could have. libgomp, which comes with torch on Linux, looks 300,000 times before it sleeps,
    but 100 times while it has more threads than the machine has cores: idle ones, kept by a thread of ours, make it so.
    """

    def __init__(self, libgomp: ctypes.CDLL):
        self.libgomp = libgomp
        self.leave: threading.Event | None = None

    @property
    def asleep(self) -> bool:
        return self.leave is not None

    def sleep(self) -> None:
        """Wait asleep from now on."""
        led, self.leave = threading.Event(), threading.Event()
        threading.Thread(target=self._lead, args=(led, self.leave), daemon=True, name="idle threads").start()
        led.wait()

    def look(self) -> None:
        """Wait as OpenMP does by itself."""
        if self.leave:
            self.leave.set()
        self.leave = None

    def _lead(self, led: threading.Event, leave: threading.Event) -> None:
        nothing = ctypes.cast(self.libgomp.omp_get_level, ctypes.c_void_p)  # any function that does no harm
        self.libgomp.GOMP_parallel(nothing, None, allowed_cores() + 1, 0)
        led.set()
        leave.wait()  # libgomp keeps the threads of a region for the next one, until the thread that led it ends


def libgomp(maps: Path = Path("/proc/self/maps")) -> ctypes.CDLL | None:
    """The library behind torch's threads, if it is GNU's. Other packages bring copies of their own."""
    try:
        found = set(re.findall(r"/.*libgomp[^/\n]*$", maps.read_text(encoding="utf-8"), re.MULTILINE))
    except OSError:
        return None
    of_torch = [name for name in found if Path(name).is_relative_to(Path(torch.__file__).parent)] or list(found)
    return ctypes.CDLL(of_torch[0]) if len(of_torch) == 1 else None


class Watch:
    """Chooses how threads wait by what they have lost since the last look."""

    def __init__(self, barrier: Barrier):
        self.barrier = barrier
        self.times = dict[str, tuple[int, int]]()
        self.looking = self.calm = 0  # seconds on end
        self.patience = PATIENCE
        self.reported = False

    def see(self, now: dict[str, tuple[int, int]]) -> None:
        """now: `times`, a second after the last call."""
        run, waited = (sum(now[t][i] - self.times.get(t, (0, 0))[i] for t in now) / 1e9 for i in (0, 1))
        self.times = now
        if run + waited < 0.2:  # the process waits for something else, or for a GPU
            return
        lost = waited / (run + waited)
        if self.barrier.asleep:
            self.calm = self.calm + 1 if lost < CALM else 0
            if self.calm >= self.patience:
                self.looking = 0
                self.barrier.look()
        elif lost < CROWDED:
            self.looking += 1
        else:
            self.patience = PATIENCE if self.looking >= self.patience else min(2 * self.patience, LONGEST)
            self.calm = 0
            self.barrier.sleep()
            if not self.reported:
                threads = torch.get_num_threads()
                words = "%d threads; %.1f cores available, others use this machine: threads sleep where they wait"
                log.info(words, threads, threads * (1 - lost))
            self.reported = True


_watching = threading.Lock()  # held for good by the first call


def share_cores() -> None:
    """From now on let the threads of this process wait in the way that suits the load of the machine.

    Results stay the same to the bit. Does nothing where the user has chosen (OMP_WAIT_POLICY, GOMP_SPINCOUNT), with one
    thread, and where threads are not libgomp's. Measured by benchmarks/busy.py.
    """
    if torch.get_num_threads() < 2 or any(name in os.environ for name in CHOSEN):
        return
    library = libgomp()
    if library is not None and _watching.acquire(blocking=False):
        threading.Thread(target=_watch, args=(Watch(Barrier(library)),), daemon=True, name="watch").start()


def _watch(watch: Watch) -> None:
    while True:
        watch.see(times())
        time.sleep(1)
