"""What follows a convolution on the GPU in one pass over its result: bias, shortcut and ReLU, which by themselves are
three, the first of them slow."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values of a program


@triton.jit(do_not_specialize=["cells"])
def _finish(
    x, bias, shortcut, cells, channels, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    place = row[:, None] * channels + channel[None, :]
    inside = (row < cells)[:, None] & (channel < channels)[None, :]
    value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    value += tl.load(bias + channel, mask=channel < channels, other=0).to(tl.float32)[None, :]
    if shortcut is not None:
        value += tl.load(shortcut + place, mask=inside, other=0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    tl.store(x + place, value, mask=inside)


def takes(x: Tensor, shortcut: Tensor | None) -> bool:
    """Whether the kernel does: both channels_last, of one type."""
    maps = [x] if shortcut is None else [x, shortcut]
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and all(
        each.dtype == x.dtype and each.is_contiguous(memory_format=torch.channels_last) for each in maps
    )


def finish(x: Tensor, bias: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    """x [N, C, H, W], which becomes x + bias [C] + shortcut [N, C, H, W], and 0 where that is negative if relu.

    The kernel sums in float32 and rounds once; other layouts and types than it takes are added one by one.
    """
    channels = x.shape[1]
    width = min(triton.next_power_of_2(channels), 256)
    rows, cells = TILE // width, x.numel() // max(channels, 1)
    if not takes(x, shortcut):
        x.add_(bias.view(-1, 1, 1))
        x = x if shortcut is None else x.add_(shortcut)
        return x.relu_() if relu else x
    if cells:
        _finish[(triton.cdiv(cells, rows), triton.cdiv(channels, width))](
            x, bias, shortcut, cells, channels, RELU=relu, ROWS=rows, CHANNELS=width,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return x
