"""README's trainings as a user starts them, on the quiet machine and beside one process that never rests: AP, and
seconds by the clock and of CPU.

    python benchmarks/recipes.py --nuclei ../shared/data/nuclei_dsb2018 --bccd ../shared/data/bccd \\
        --json benchmarks/results/recipes_cpu.json

Each run is kept in --out: what has ended is not trained again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.busy import never_rest

RECIPES = {"quickstart": "shapes", "mask_rcnn_nuclei": "nuclei", "faster_rcnn_bccd": "bccd"}
BESIDE = {"quiet": 0, "one": 1}


def run(recipe: str, root: Path, folder: Path, others: int) -> dict[str, float]:
    """Train beside so many other processes; the seconds that it took."""
    record = folder.with_suffix(".json")
    if not record.is_file():
        running = [multiprocessing.Process(target=never_rest, daemon=True) for _ in range(others)]
        for process in running:
            process.start()
        command = [sys.executable, "train.py", f"experiment={recipe}", f"data.root={root}", f"run_dir={folder}"]
        started = time.monotonic()
        process = subprocess.Popen([*command, "resume=none"])
        _, status, usage = os.wait4(process.pid, 0)  # with its data-loading processes
        if status:
            raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
        clock, cpu = time.monotonic() - started, usage.ru_utime + usage.ru_stime
        for process in running:
            process.kill()
        record.write_text(json.dumps({"clock_s": round(clock, 1), "cpu_s": round(cpu, 1)}), encoding="utf-8")
    return json.loads(record.read_text(encoding="utf-8"))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("runs/recipes"), help="where runs are kept")
    options.add_argument("--beside", nargs="+", choices=BESIDE, default=list(BESIDE), help="no other process, or one")
    options.add_argument("--json", type=Path, help="file to write the figures to")
    for data in RECIPES.values():
        options.add_argument(f"--{data}", type=Path, default=Path("data") / data, help="its folder")
    args = options.parse_args()
    figures = {}
    for recipe, data in RECIPES.items():
        for name in args.beside:
            folder = args.out / f"{recipe}-{name}"
            seconds = run(recipe, getattr(args, data), folder, BESIDE[name])
            metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
            found = {kind: {key: round(100 * metrics[kind][key], 1) for key in ("AP", "AP50")} for kind in metrics}
            figures.setdefault(recipe, {})[name] = {**seconds, **found}
            print(recipe, name, figures[recipe][name], flush=True)
    harness.save(args.json, "cpu", recipes=figures)


if __name__ == "__main__":
    main()
