"""The programs on a GPU, as users start them: training, resumed to the bit, compiled, in bf16; evaluation and bench."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from detector import checkpoint
from detector.commands import bench, evaluate
from tests.runs import curve

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = pytest.mark.cuda
ON_GPU = ["runtime.device=cuda", "optimizer.lr=0.01"]


def trained(program, *overrides: str) -> str:
    """What the program prints while it trains on the GPU."""
    running = program(*ON_GPU, *overrides)
    assert running.end() == 0, running.output
    return running.output


@pytest.mark.parametrize("roi", ["align", "deformable"])
def test_a_deterministic_run_resumes_to_the_bit(program, tmp_path, roi):
    common = ["runtime.deterministic=true", "runtime.checkpoint_every=2", "augment=symmetry", f"roi={roi}"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    trained(program, *common, f"run_dir={whole}")
    shutil.copytree(whole, part)
    shutil.move(part / "iteration_0000006.pt", part / "last.pt")
    for name in ("best.pt", "iteration_0000008.pt"):
        (part / name).unlink()
    trained(program, *common, f"run_dir={part}")
    assert curve(part) == curve(whole)
    left, right = (checkpoint.load(folder / "last.pt")["model"] for folder in (part, whole))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_bf16_compiled_with_workers(program, tmp_path):
    """What a GPU's user has, and then the evaluation, on the GPU and on the CPU."""
    more = ["runtime.precision=auto", "runtime.compile=true", "runtime.workers=2", "training.batch_size=8"]
    output = trained(program, *more, "schedule.max_iterations=12", "evaluation.every=6")
    assert "bf16" in output
    folder = tmp_path / "run"
    losses = [sum(v for k, v in row.items() if k.startswith("loss")) for row in curve(folder).values()]
    assert losses[-1] < losses[0]
    found = checkpoint.load(folder / "last.pt")
    assert all(tensor.isfinite().all() for tensor in found["model"].values() if tensor.is_floating_point())


def test_the_gpus_memory_sets_the_batch(program, tmp_path):
    output = trained(program, "training.batch_size=auto", "training.reference_batch=16", "schedule.max_iterations=3")
    assert "training.batch_size = 16: 16 images at once" in output  # of 24


def test_evaluations_agree(program, call, shapes_tiny, tmp_path):
    trained(program, "schedule.max_iterations=60")
    figures = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        arguments = [f"checkpoint={tmp_path / 'run' / 'last.pt'}", f"device={device}", f"output={out}"]
        code, _, error = call(evaluate.main, *arguments)
        assert code == 0, error
        figures[device] = json.loads((out / "metrics.json").read_text())
    for kind in ("bbox", "segm"):
        cpu, cuda = (figures[device][kind]["AP"] for device in ("cpu", "cuda"))
        assert cuda == pytest.approx(cpu, abs=0.01)


def test_bench_times_every_way(program, call, shapes_tiny, tmp_path):
    trained(program, "schedule.max_iterations=20")
    report = tmp_path / "bench.json"
    arguments = ["device=cuda", "ways=[fp32,bf16,compile]", "batch=[1,4]", f"output={report}"]
    code, out, error = call(bench.main, f"checkpoint={tmp_path / 'run' / 'last.pt'}", *arguments)
    assert code == 0, error
    assert all(way in out for way in ("fp32", "bf16", "compile"))
    assert Path(report).exists()
