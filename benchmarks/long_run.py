"""Whether a long training run grows: resident memory, open files and threads of it and its workers, and its throughput.

    python benchmarks/long_run.py --iterations 2000 training.batch_size=2 --json benchmarks/results/long_run.json

Runs train.py with the given overrides, evaluating after each quarter, and looks at it from outside every few seconds
of training. The first half, with its two evaluations, is warm-up: the second finds more, and so takes more memory, than
the first of a model that had learnt little. Throughput is told in iterations per second of processor time, which other
programs do not disturb.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness

ROOT = Path(__file__).resolve().parents[1]
FIGURES = ("parent_mib", "workers_mib", "open_files", "threads")


def look_at(process: psutil.Process) -> dict[str, float]:
    """Figures of a process and its children, of whose memory, shared with the parent, only their own counts."""
    workers = process.children(recursive=True)
    return {
        "parent_mib": process.memory_info().rss / 2**20,
        "workers_mib": sum(worker.memory_full_info().uss for worker in workers) / 2**20,
        "open_files": sum(p.num_fds() for p in (process, *workers)),
        "threads": sum(p.num_threads() for p in (process, *workers)),
        "cpu_s": sum(sum(p.cpu_times()[:2]) for p in (process, *workers)),
    }


def iteration_of(log: Path) -> int:
    """The last iteration that log.jsonl tells of."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return json.loads(lines[-1])["iteration"] if lines else 0


def watch(process: subprocess.Popen, log: Path, pause: float) -> list[dict[str, float]]:
    """Samples of a training run, each with the iteration it stands at, until the run ends."""
    samples, program = [], psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error, json.JSONDecodeError):  # it is just ending, or writing a line
            samples.append({"iteration": iteration_of(log), **look_at(program)})
        time.sleep(pause)
    return samples


def summary(samples: list[dict[str, float]], iterations: int) -> dict[str, Any]:
    """Medians of the second, third and last quarter; growth from the third to the last, and the largest within one of
    them, from its first to its last third."""
    quarters = [[s for s in samples if q * iterations < 4 * s["iteration"] < (q + 1) * iterations] for q in range(4)]
    if min(map(len, quarters)) < 3:
        raise ValueError(f"{len(samples)} samples are too few: a quarter of the run has less than three")
    found: dict[str, Any] = {}
    for figure in FIGURES:
        values = [[s[figure] for s in quarter] for quarter in quarters[1:]]
        medians = [statistics.median(v) for v in values]
        ends = [(statistics.median(v[: len(v) // 3]), statistics.median(v[-(len(v) // 3) :])) for v in values]
        found[figure] = {
            "quarters": [round(m, 1) for m in medians],
            "growth": round(medians[2] / medians[1] - 1, 4),
            "growth_within": round(max(last / first - 1 for first, last in ends), 4),
        }
    turns = [(quarter[0], quarter[-1]) for quarter in quarters[1:]]
    speeds = [(b["iteration"] - a["iteration"]) / (b["cpu_s"] - a["cpu_s"]) for a, b in turns]
    found["iterations_per_cpu_s"] = {
        "quarters": [round(s, 3) for s in speeds],
        "growth": round(speeds[2] / speeds[1] - 1, 4),
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two looks")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_intermixed_args()
    folder = Path(tempfile.mkdtemp(prefix="long_run_"))
    settings = [f"schedule.max_iterations={options.iterations}", f"evaluation.every={options.iterations // 4}"]
    command = [sys.executable, str(ROOT / "train.py"), *settings, *options.overrides, f"run_dir={folder}"]
    try:
        with open(folder / "output.txt", "w", encoding="utf-8") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            samples = watch(process, folder / "log.jsonl", options.pause)
        if process.returncode:
            sys.exit((folder / "output.txt").read_text(encoding="utf-8"))
        found = summary(samples, options.iterations)
    finally:
        shutil.rmtree(folder)
    rows = [[name, *figures["quarters"], f"{figures['growth']:+.1%}"] for name, figures in found.items()]
    print(harness.table(["figure", "2nd quarter", "3rd", "4th", "3rd to 4th"], rows))
    thinned = [{k: round(v, 1) for k, v in s.items()} for s in samples[:: max(1, len(samples) // 100)]]
    harness.save(options.json, "cpu", iterations=options.iterations, overrides=options.overrides, summary=found,
                 samples=thinned)  # fmt: skip


if __name__ == "__main__":
    main()
