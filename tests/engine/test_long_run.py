"""A long run keeps its memory, files and threads; the benchmark that watches real ones sees it where it does not."""

from __future__ import annotations

import gc
import sys

import psutil
import pytest
import torch

from benchmarks.long_run import FIGURES, summary
from detector.engine import train as loop


def steady(iteration: int) -> dict[str, float]:
    constant = {"parent_mib": 500.0, "workers_mib": 90.0, "open_files": 40, "threads": 12}
    return {"iteration": iteration, "cpu_s": iteration * 0.25, **constant}


def test_growth_is_seen():
    samples = [steady(i) for i in range(0, 401, 10)]
    found = summary(samples, 400)
    assert all(found[figure]["growth"] == found[figure]["growth_within"] == 0 for figure in FIGURES)
    assert found["iterations_per_cpu_s"] == {"quarters": [4.0, 4.0, 4.0], "growth": 0}
    leaking = [{**s, "open_files": s["open_files"] + s["iteration"] // 10, "cpu_s": s["cpu_s"] ** 2} for s in samples]
    found = summary(leaking, 400)
    assert found["open_files"]["growth"] > 0.1 and found["iterations_per_cpu_s"]["growth"] < -0.2
    assert found["open_files"]["growth_within"] > 0.05
    with pytest.raises(ValueError, match="too few"):
        summary(samples[:20], 400)


@pytest.mark.slow
def test_steps_leave_nothing_behind(run, monkeypatch):
    """Between step 30 and step 70, with evaluations, checkpoints and TensorBoard: no more tensors, files or threads."""
    process, steps, looks = psutil.Process(), [], []
    original = loop.forward_backward

    def look(*args, **kwargs):
        steps.append(len(steps) + 1)
        if steps[-1] in (30, 70):
            gc.collect()
            tensors = sum(type(item) in (torch.Tensor, torch.nn.Parameter) for item in gc.get_objects())
            looks.append((sys.getallocatedblocks(), tensors, process.num_fds(), process.num_threads()))
        return original(*args, **kwargs)

    monkeypatch.setattr(loop, "forward_backward", look)
    often = ["evaluation.every=20", "runtime.checkpoint_every=10", "runtime.tensorboard=true"]
    run("schedule.max_iterations=70", *often)
    (blocks, tensors, *counts), (blocks_after, tensors_after, *counts_after) = looks
    assert counts_after == counts
    assert tensors_after - tensors < 20  # half a tensor a step
    assert blocks_after - blocks < 20 * 40  # 20 objects of Python a step
