"""Everything that needs a GPU, in one command of at most nine minutes: the tests, the measurements, the quickstart.

    python benchmarks/gpu_check.py                                  results into benchmarks/results/gpu_check.json
    python benchmarks/gpu_check.py --output DIR --wheels wheels     on a machine without a package index: installs the
                                                                    wheels in that folder for itself first
    python benchmarks/gpu_check.py --only tests kernels

Every step is a process with a time limit of its own, so one that fails or hangs costs the others nothing. The output
folder gets gpu_check.json (exit status, seconds and figures of every step) and gpu_check.log.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 520  # seconds
FOLDER = "runs/gpu_check"  # of what the steps write


def steps() -> dict[str, tuple[int, list[str], str | None]]:
    """Name -> (limit in seconds, arguments of python, the file in FOLDER that it leaves its figures in)."""
    pytest = ["-m", "pytest", "-q", "-rs", "--timeout=150", "-p", "no:benchmark", "-n", "14", "tests/gpu"]
    roi_ops = ["benchmarks/roi_ops.py", "--device", "cuda", "--methods", "align", "deformable", "--rois", "1000"]
    step = ["benchmarks/train_step.py", "--device", "cuda", "--repeats", "4", "--steps", "5"]
    bf16 = [*step, "--dtype", "bf16"]
    large = ["--size", "800", "1333"]
    jitter = ["--size", "1024", "1024", "--contenders", "ours", "graphs", "torchvision"]
    detect = ["benchmarks/inference.py", "--device", "cuda", "--size", "800", "1333", "--batch", "1", "8"]
    shapes, demo = f"{FOLDER}/shapes", f"{FOLDER}/quickstart"

    def measured(limit: int, arguments: list[str], name: str) -> tuple[int, list[str], str]:
        return limit, [*arguments, "--json", f"{FOLDER}/{name}.json"], f"{name}.json"

    return {
        "tests": (280, pytest, None),
        "kernels": measured(60, ["benchmarks/roi_kernels.py"], "kernels"),
        "shapes": (60, ["-m", "detector", "shapes", "--out", shapes], None),
        "quickstart": (120, ["train.py", f"data.root={shapes}", f"run_dir={demo}"], "quickstart/metrics.json"),
        "step, batch 8": measured(60, [*bf16, *large, "--batch", "8"], "step_bf16_8"),
        "step, batch 16": measured(60, [*bf16, *large, "--batch", "16"], "step_bf16_16"),
        "step in float32": measured(60, [*step, *large, "--batch", "8"], "step_fp32_8"),
        "what a step does": (60, [*bf16, *large, "--batch", "8", "--profile"], None),
        "inference": measured(120, [*detect, "--dtype", "bf16", "--repeats", "3"], "inference_bf16"),
        "ops in float32": measured(45, roi_ops, "roi_ops_fp32"),
        "ops in bfloat16": measured(45, [*roi_ops, "--dtype", "bfloat16"], "roi_ops_bf16"),
        "step of fixed sizes": measured(150, [*bf16, *jitter, "--batch", "8"], "step_bf16_jitter"),
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
    parser.add_argument("--only", nargs="+", choices=list(steps()), help="these steps alone")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for all of it")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        would = "\n".join(f"  {name}: python {' '.join(line)}" for name, (_, line, _) in steps().items())
        raise SystemExit(f"torch.cuda.is_available() is False. With a GPU, this would run:\n{would}")
    output, folder = args.output.resolve(), ROOT / FOLDER
    output.mkdir(parents=True, exist_ok=True)
    if folder.exists():  # figures of an earlier check
        shutil.rmtree(folder)
    begin, report = time.monotonic(), {}
    with tempfile.TemporaryDirectory() as site, (output / "gpu_check.log").open("w", encoding="utf-8") as log:
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        if args.wheels:
            pip = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", site]
            status, text = run([*pip, *map(str, args.wheels.resolve().glob("*.whl"))], 60, dict(os.environ))
            if status != 0:
                raise SystemExit(f"the wheels of {args.wheels} cannot be installed:\n{text}")
            path.insert(0, site)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONFAULTHANDLER": "1"}
        for name in args.only or steps():
            limit, arguments, figures = steps()[name]
            start = time.monotonic()
            left = args.total - (start - begin)
            alone = {"OMP_NUM_THREADS": "1"} if name == "tests" else {}  # many processes beside each other
            status, text = (
                run(arguments, min(limit, left), environment | alone) if left > 5 else (None, "no time left\n")
            )
            report[name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
            if figures and (folder / figures).exists():
                report[name]["figures"] = json.loads((folder / figures).read_text(encoding="utf-8"))
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
