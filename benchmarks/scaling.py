"""Training with torchrun on 1, 2, ... processes of this machine: the same global batch, images per second of all ranks.

    python benchmarks/scaling.py --ranks 1 2                        one CPU thread each
    python benchmarks/scaling.py --ranks 1 2 4 8 --device cuda      one GPU each; overrides of train.py may follow

The runs alternate. Efficiency is the speed-up over the smallest number of ranks, divided by how many times as many they
are. The figure of a run is the median over its steps, the first fifth left out. The losses of the first step are
compared: with frozen norms they differ by rounding alone, batch norms see the rank's share of the batch.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness

ROOT = Path(__file__).resolve().parents[1]


def train(ranks: int, iterations: int, device: str, overrides: list[str]) -> list[dict]:
    """The lines of log.jsonl of a run with that many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run_dir={folder}", f"schedule.max_iterations={iterations}", "evaluation.every=null"]
        settings += ["runtime.log_every=1", "runtime.tensorboard=false", "runtime.pictures_every=null"]
        settings += ["runtime.checkpoint_every=1000000", f"runtime.device={device}"]
        if device == "cpu":
            settings += ["runtime.threads=1", "runtime.workers=0"]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, "train.py", *settings, *overrides]
        done = subprocess.run(
            command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if "images_per_second" in line]


def main() -> None:
    options = harness.parser(__doc__, repeats=2)
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    options.add_argument("--iterations", type=int, default=30)
    args, overrides = options.parse_known_args()
    speeds: dict[int, list[float]] = {ranks: [] for ranks in args.ranks}
    first: dict[int, float] = {}
    for _ in range(args.repeats):
        for ranks in args.ranks:
            lines = train(ranks, args.iterations, args.device, overrides)
            speeds[ranks].append(statistics.median(line["images_per_second"] for line in lines[len(lines) // 5 :]))
            first[ranks] = lines[0]["loss"]
    base = min(args.ranks)
    figures = {}
    for ranks, values in speeds.items():
        speed = statistics.median(values)
        ratio = speed / statistics.median(speeds[base])
        figures[ranks] = {
            "images_per_s": round(speed, 2),
            "speedup": round(ratio, 3),
            "efficiency": round(ratio * base / ranks, 3),
            "first_loss": round(first[ranks], 6),
        }
    rows = [[ranks, *row.values()] for ranks, row in figures.items()]
    print(harness.table(["ranks", "images/s", "speed-up", "efficiency", "first loss"], rows))
    harness.save(args.json, args.device, overrides=overrides, iterations=args.iterations, scaling=figures)


if __name__ == "__main__":
    main()
