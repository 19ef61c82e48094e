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
# Cores that threads wait for in vain, from which on they give way, and under which they no longer need to. Between the
# two both ways are equally fast. Two data workers take 0.2 of a core: threads that slept for that would lose a fifth.
CROWDED, CALM = 0.4, 0.25
FREE = 0.6  # of a core that nobody uses, from which on another thread pays
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
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            run, waited = (task / "schedstat").read_text(encoding="ascii").split()[:2]
        except (OSError, ValueError):  # it has ended, or ends
            continue
        found[task.name] = int(run), int(waited)
    return found


def idle(stat: Path = Path("/proc/stat")) -> float | None:
    """Seconds that the cores of this process's affinity have been idle, since the machine started and in sum; None
    where the system does not tell."""
    allowed = {f"cpu{n}" for n in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
    try:
        rows = [line.split() for line in stat.read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    ticks = [int(row[4]) + int(row[5]) for row in rows if row and row[0] in allowed]  # idle, and waiting for a disk
    return sum(ticks) / os.sysconf("SC_CLK_TCK") if any(ticks) else None


class Barrier:
    """How OpenMP's threads wait at the end of a parallel region: asleep, or looking for the others all the time.

    Looking is fastest on cores of one's own. Where one thread has no core for the moment the others look for it in
    vain, on cores that it could have. libgomp, which comes with torch on Linux, looks 300,000 times before it sleeps,
    but 100 times while it has more threads than the machine has cores: idle ones, kept by a thread of ours, make it so.
    """

    words = "threads sleep where they wait"

    def __init__(self, libgomp: ctypes.CDLL):
        self.libgomp = libgomp
        self.leave: threading.Event | None = None

    @property
    def yielding(self) -> bool:
        return self.leave is not None

    def give_way(self, lost: float, seconds: int) -> None:
        """Wait asleep from now on, whatever was lost for how many seconds."""
        if self.yielding:
            return
        led, self.leave = threading.Event(), threading.Event()
        threading.Thread(target=self._lead, args=(led, self.leave), daemon=True, name="idle threads").start()
        led.wait()

    def may_return(self, idle: float | None) -> bool:
        """Always: threads that sleep show by their waiting what they would lose."""
        return True

    def take_back(self) -> None:
        """Wait as OpenMP does by itself."""
        if self.leave:
            self.leave.set()
        self.leave = None

    def _lead(self, led: threading.Event, leave: threading.Event) -> None:
        nothing = ctypes.cast(self.libgomp.omp_get_level, ctypes.c_void_p)  # any function that does no harm
        self.libgomp.GOMP_parallel(nothing, None, allowed_cores() + 1, 0)
        led.set()
        leave.wait()  # libgomp keeps the threads of a region for the next one, until the thread that led it ends


class Number:
    """How many threads work, of those that there were at first: so many fewer as wait for cores in vain.

    That is faster than threads that sleep, since oneDNN's own barriers look for the others in any case. But sums over
    another number of threads have other last bits: it is for those who ask for it. `follow` puts it into effect.
    """

    words = "fewer threads work"

    def __init__(self, most: int):
        self.most = self.wanted = most
        self.followed = False  # until then nothing is chosen: the start of a program crowds its own cores

    @property
    def yielding(self) -> bool:
        return self.wanted < self.most

    def give_way(self, lost: float, seconds: int) -> None:
        """Fewer by the cores that are lost, rounded up; not for a second alone, which may be one of our own making."""
        if self.followed and seconds > 1:
            self.wanted = max(1, self.wanted - math.ceil(lost))

    def may_return(self, idle: float | None) -> bool:
        """Where a core is free for one more. Where nobody knows, a try tells."""
        return idle is None or idle >= FREE

    def take_back(self) -> None:
        """All of them."""
        self.wanted = self.most


def libgomp(maps: Path = Path("/proc/self/maps")) -> ctypes.CDLL | None:
    """The library behind torch's threads, if it is GNU's. Other packages bring copies of their own."""
    try:
        found = set(re.findall(r"/.*libgomp[^/\n]*$", maps.read_text(encoding="utf-8"), re.MULTILINE))
    except OSError:
        return None
    folder = Path(torch.__file__).resolve().parent  # an environment may be a link
    of_torch = [name for name in found if Path(name).is_relative_to(folder)] or list(found)
    return ctypes.CDLL(of_torch[0]) if len(of_torch) == 1 else None


class Watch:
    """Lets a `Barrier` or a `Number` of threads give way and take back, by what threads lost since the last look."""

    def __init__(self):
        self.times, self.idle = dict[str, tuple[int, int]](), None
        self.begin(None)

    def begin(self, way: Barrier | Number | None) -> None:
        """Of a run, or with None the end of one."""
        self.way = way
        self.taken = self.calm = self.crowded = 0  # seconds on end
        self.patience = PATIENCE
        self.reported = False

    def see(self, now: dict[str, tuple[int, int]], idle: float | None = None) -> None:
        """now, idle: of `times` and of `idle`, a second after the last call."""
        way = self.way  # of which another thread may begin another
        run, lost = (sum(now[t][i] - self.times.get(t, (0, 0))[i] for t in now) / 1e9 for i in (0, 1))
        free = None if idle is None or self.idle is None else idle - self.idle
        self.times, self.idle = now, idle
        if way is None or run + lost < 0.2:  # the process waits for something else, or for a GPU
            return
        before = way.yielding
        if lost >= CROWDED:
            self.crowded, self.calm = self.crowded + 1, 0
            way.give_way(lost, self.crowded)
            if way.yielding and not before:
                self.patience = PATIENCE if self.taken >= self.patience else min(2 * self.patience, LONGEST)
                self.taken = 0
                self._report(run / (run + lost), way.words)
            return
        self.crowded = 0
        if not before:
            self.taken += 1
            return
        self.calm = self.calm + 1 if lost < CALM and way.may_return(free) else 0
        if self.calm >= self.patience:
            way.take_back()

    def _report(self, share: float, words: str) -> None:
        if not self.reported:
            threads = torch.get_num_threads()
            told = "%d threads; %.1f cores available, others use this machine: %s"
            log.info(told, threads, threads * share, words)
        self.reported = True


_watch: Watch | None = None  # that of this process, which looks from the first call on


def share_cores(by_number: bool = False) -> None:
    """From now on let the threads of this process give way to others that use the machine, and take back what is free.

    They wait asleep then, and results stay the same to the bit; this does nothing where the user has chosen how they
    wait (OMP_WAIT_POLICY, GOMP_SPINCOUNT) and where they are not libgomp's. by_number: fewer of them work instead. Does
    nothing with one thread, nor where the system does not count what threads wait. Measured by benchmarks/busy.py.
    """
    global _watch
    end_sharing()
    if torch.get_num_threads() < 2 or not times():
        return
    way: Barrier | Number
    if by_number:
        way = Number(torch.get_num_threads())
    elif any(name in os.environ for name in CHOSEN) or (library := libgomp()) is None:
        return
    else:
        way = Barrier(library)
    if _watch is None:
        _watch = Watch()
        threading.Thread(target=_look_on, args=(_watch,), daemon=True, name="watch").start()
    _watch.begin(way)


def end_sharing() -> None:
    """End what `share_cores` began for an earlier run of this process: all threads work, and wait as by themselves."""
    if _watch and _watch.way:
        _watch.way.take_back()
        follow()
        _watch.begin(None)


def number_varies() -> bool:
    """Whether `share_cores` chooses how many threads work."""
    return _watch is not None and isinstance(_watch.way, Number)


def follow() -> None:
    """Work with as many threads as `share_cores` by number has chosen, which only this thread can say for itself. For
    loops, between two pieces of work."""
    if _watch and isinstance(_watch.way, Number):
        _watch.way.followed = True
        if _watch.way.wanted != torch.get_num_threads():
            torch.set_num_threads(_watch.way.wanted)


def _look_on(watch: Watch) -> None:
    while True:
        watch.see(times(), idle())
        time.sleep(1)
