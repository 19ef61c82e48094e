"""Everything that needs a GPU, in one command of at most nine minutes: the tests, then the measurements.

    python benchmarks/gpu_check.py                                  results into benchmarks/results
    python benchmarks/gpu_check.py --output DIR --wheels wheels     on a machine without a package index: installs the
                                                                    wheels in that folder for itself first
    python benchmarks/gpu_check.py --only tests kernels

Every step is a process with a time limit of its own, so one that fails or hangs costs the others nothing. The output
folder gets gpu_check.json (exit status and time of the steps), gpu_check.log and the figures of every benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 520  # seconds


def steps(output: Path) -> dict[str, tuple[int, list[str]]]:
    """Name -> (limit in seconds, arguments of python)."""
    pytest = ["-m", "pytest", "-q", "-rs", "--timeout=120"]
    roi_ops = ["benchmarks/roi_ops.py", "--device", "cuda", "--methods", "align", "deformable", "--rois", "1000"]
    step = ["benchmarks/train_step.py", "--device", "cuda", "--repeats", "4"]
    large = [*step, "--size", "800", "1333"]
    jitter = [*step, "--size", "1024", "1024", "--contenders", "ours", "compiled", "graphs", "torchvision"]
    detect = ["benchmarks/inference.py", "--device", "cuda", "--size", "800", "1333", "--batch", "1", "8"]

    def into(name: str) -> list[str]:
        return ["--json", f"{output}/{name}_gpu.json"]

    return {
        "tests": (180, [*pytest, "-m", "cuda", "--continue-on-collection-errors", "tests"]),
        "kernels": (80, ["benchmarks/roi_kernels.py", "--tiles", *into("roi_kernels")]),
        "ops in float32": (45, [*roi_ops, *into("roi_ops_fp32")]),
        "ops in bfloat16": (45, [*roi_ops, "--dtype", "bfloat16", *into("roi_ops_bf16")]),
        "step, batch 8": (60, [*large, "--batch", "8", "--dtype", "bf16", *into("train_step_bf16_8")]),
        "step, batch 16": (60, [*large, "--batch", "16", "--dtype", "bf16", *into("train_step_bf16_16")]),
        "step in float32": (60, [*large, "--batch", "8", *into("train_step_fp32_8")]),
        "inference": (60, [*detect, "--dtype", "bf16", *into("inference_bf16")]),
        "step of fixed sizes": (150, [*jitter, "--batch", "16", "--dtype", "bf16", *into("train_step_bf16_lsj")]),
    }


def run(arguments: Sequence[str], limit: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status (None: past its limit) and output of one python process."""
    command = [sys.executable, "-u", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
        log.seek(0)
        return status, log.read()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this Python lacks")
    parser.add_argument("--only", nargs="+", choices=list(steps(Path())), help="these steps alone")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        would = "\n".join(f"  {name}: python {' '.join(line)}" for name, (_, line) in steps(args.output).items())
        raise SystemExit(f"torch.cuda.is_available() is False. With a GPU, this would run:\n{would}")
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    begin, report = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as site, (output / "gpu_check.log").open("w", encoding="utf-8") as log:
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        if args.wheels:
            pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", site]
            run([*pip, *map(str, args.wheels.resolve().glob("*.whl"))], 60, dict(os.environ))
            path.insert(0, site)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        for name, (limit, arguments) in steps(output).items():
            if args.only and name not in args.only:
                continue
            start = time.monotonic()
            left = TOTAL - (start - begin)
            status, text = run(arguments, min(limit, left), environment) if left > 5 else (None, "no time left\n")
            report[name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
            log.write(f"===== {name}: {' '.join(arguments)}\n{text}\n")
            log.flush()
            print(f"===== {name}: {describe(status)} after {report[name]['seconds']} s\n{text[-3000:]}", flush=True)
            (output / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{name:20} {describe(r['status']):10} {r['seconds']:6} s" for name, r in report.items()))
    return int(any(r["status"] != 0 for r in report.values()))


def describe(status: int | None) -> str:
    return "too long" if status is None else "ok" if status == 0 else f"failed ({status})"


if __name__ == "__main__":
    raise SystemExit(main())
