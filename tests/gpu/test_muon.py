"""Muon's steps on a GPU: those of the CPU, tf32 or not, without a wait of the host."""

from __future__ import annotations

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from detector.engine.muon import Muon

pytestmark = pytest.mark.cuda
SHAPES = [(64, 32, 3, 3), (64, 64, 3, 3), (256, 3136), (64,), (7, 256)]


def steps(device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    optimizer = Muon(weights, lr=0.01, fused=True)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [weight.detach().cpu() for weight in weights]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_steps_are_the_cpus(precision):
    expected, before = steps("cpu"), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = steps("cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
