"""What the benchmarks share: interleaved runs, medians and ratios, peak memory, JSON beside the table.

A contender is a callable that does the whole unit of work. They take turns, A B C A B C ..., so that a machine whose
speed drifts slows all of them alike; figures are medians, claims are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from detector.runtime import chosen_precision

RESULTS = Path(__file__).parent / "results"


def parser(description: str, repeats: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--repeats", type=int, default=repeats, help="counted turns of each contender")
    options.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    options.add_argument("--json", type=Path, help="file to write the figures to")
    return options


def interleave(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every turn of every contender by a clock, after one turn each that is not counted."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, work in contenders.items():
            wait()
            start = clock()
            work()
            wait()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def apart(
    builders: Mapping[str, Callable[[], Callable[[], Any]]],
    repeats: int,
    device: str = "cpu",
    environments: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, list[Any]], dict[str, float]]:
    """As `interleave`, each contender in a process of its own, with its own settings of memory and threads.

    A builder, picklable, is called there and gives the unit of work; environments: variables that some contenders have.
    Returns the seconds of the counted turns, what each turn returned, the first one's too, and the peak memory in MiB:
    of the GPU's allocator, or of the process.
    """
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    results: dict[str, list[Any]] = {name: [] for name in builders}
    memory, ends = {}, {}
    for name, build in builders.items():
        ends[name], theirs = context.Pipe()
        with patch.dict(os.environ, (environments or {}).get(name, {})):
            context.Process(target=_serve, args=(theirs, build, device), daemon=True).start()
        theirs.close()  # so that the end of the process ends the wait for it
        if not device.startswith("cuda"):  # the threads of those that are ready would give way to those that start
            ends[name].recv()
    if device.startswith("cuda"):
        for end in ends.values():
            end.recv()
    for turn in range(repeats + 1):
        for name, end in ends.items():
            end.send(True)
            taken, result, memory[name] = end.recv()
            results[name].append(result)
            if turn:
                seconds[name].append(taken)
    for end in ends.values():
        end.send(False)
    return seconds, results, memory


def _serve(connection: Any, build: Callable[[], Callable[[], Any]], device: str) -> None:
    work, cuda = build(), device.startswith("cuda")
    wait = torch.cuda.synchronize if cuda else lambda: None
    connection.send("ready")
    while connection.recv():
        wait()
        start = time.perf_counter()
        result = work()
        wait()
        taken = time.perf_counter() - start
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        connection.send((taken, result, torch.cuda.max_memory_allocated() / 2**20 if cuda else rss))


def peak_memory(work: Callable[[], Any], device: str = "cpu", turns: int = 2) -> float:
    """Peak memory in MiB of `work`: of the GPU's allocator, or of a forked process that does nothing else."""
    if device.startswith("cuda"):
        work()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**20
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        torch.set_num_threads(1)  # a forked process must not wait for the threads of its parent
        for _ in range(turns):
            work()
        send.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    process = context.Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the process that measured memory ended with exit code {process.exitcode}")
    return receive.recv()


def machine(device: str) -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    about = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bf16": chosen_precision(torch.device("cpu"), "auto") == "bf16",  # whether it has instructions for it
    }
    if device.startswith("cuda"):
        about["gpu"] = torch.cuda.get_device_name()
    return about


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(seconds: Mapping[str, Sequence[float]], reference: str) -> dict[str, dict[str, float]]:
    """Per contender: median, minimum and maximum in ms, and `speedup` = median of `reference` / own median."""
    base = statistics.median(seconds[reference])
    return {
        name: {
            "median_ms": round(1000 * statistics.median(values), 3),
            "min_ms": round(1000 * min(values), 3),
            "max_ms": round(1000 * max(values), 3),
            "speedup": round(base / statistics.median(values), 3),
        }
        for name, values in seconds.items()
    }


def save(path: Path | None, device: str, **figures: Any) -> None:
    """Write the figures with the machine and the command line as JSON."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(RESULTS.parents[1]) if script.is_relative_to(RESULTS.parents[1]) else script.name
    command = " ".join(["python", str(name), *sys.argv[1:]])
    path.write_text(
        json.dumps({"command": command, "machine": machine(device), **figures}, indent=1) + "\n", encoding="utf-8"
    )
