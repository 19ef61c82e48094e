"""The weighted bag of cells on the GPU: gather rows of a table, weigh, sum; and its maximum.

    weighted_bag_cuda:  out[b] = sum_k weights[b, k] * table[indices[b, k]]
    max_bag_cuda:       out[b] = max_k table[indices[b, k]]

Sums are accumulated in float32 whatever the dtype of the table (float32, bfloat16, float16). The ops are registered
with PyTorch: they work under torch.compile and in CUDA graphs, for they never wait for the device and all shapes follow
from the shapes of the input.

Dimensions: T cells in the table, C channels, B bags of K entries; a program handles a tile of ROWS bags by CHANNELS.
"""

from __future__ import annotations

from math import log2

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, CHANNELS = 4, 256  # the tile of one program
VALUES = 8  # per thread: 16 bytes of bfloat16 in one piece, of float32 in two


@triton.jit
def _tile(bags, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Bags [ROWS] and channels [CHANNELS] of this program, which of the bags exist, and the tile's places in [B, C]."""
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = bag < bags
    return bag, channel, live, bag[:, None] * channels + channel[None, :], live[:, None] & (channel < channels)[None, :]


@triton.jit
def _entry(indices, bag, live, k, entries, cells):
    """Entry k of the bags: cell [ROWS], and whether it exists."""
    cell = tl.load(indices + bag * entries + k, mask=live, other=-1).to(tl.int64)
    return cell, live & (cell >= 0) & (cell < cells)


@triton.jit(do_not_specialize=["bags", "entries", "cells"])
def _bag_forward(
    table, indices, weights, out, bags, entries, cells, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    bag, channel, live, place, inside = _tile(bags, channels, ROWS, CHANNELS)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for k in range(entries):
        cell, valid = _entry(indices, bag, live, k, entries, cells)
        weight = tl.load(weights + bag * entries + k, mask=valid, other=0).to(tl.float32)
        rows = cell[:, None] * channels + channel[None, :]
        total += weight[:, None] * tl.load(table + rows, mask=inside & valid[:, None], other=0).to(tl.float32)
    tl.store(out + place, total, mask=inside)


@triton.jit(do_not_specialize=["bags", "entries", "cells"])
def _bag_table_gradient(
    grad, indices, weights, table_grad, scale, bags, entries, cells, channels,
    FIXED_POINT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    bag, channel, live, place, inside = _tile(bags, channels, ROWS, CHANNELS)
    value = tl.load(grad + place, mask=inside, other=0).to(tl.float32)
    for k in range(entries):
        cell, valid = _entry(indices, bag, live, k, entries, cells)
        weight = tl.load(weights + bag * entries + k, mask=valid, other=0).to(tl.float32)
        rows = cell[:, None] * channels + channel[None, :]
        scatter(table_grad + rows, weight[:, None] * value, inside & valid[:, None], scale, FIXED_POINT)


@triton.jit(do_not_specialize=["bags", "entries", "cells"])
def _bag_weights_gradient(
    grad, table, indices, weights_grad, bags, entries, cells, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = bag < bags
    for k in range(entries):
        cell, valid = _entry(indices, bag, live, k, entries, cells)
        product = tl.zeros((ROWS, CHANNELS), tl.float32)
        for first in range(0, channels, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            inside = valid[:, None] & (channel < channels)[None, :]
            row = tl.load(table + cell[:, None] * channels + channel[None, :], mask=inside, other=0).to(tl.float32)
            value = tl.load(grad + bag[:, None] * channels + channel[None, :], mask=inside, other=0).to(tl.float32)
            product += row * value
        tl.store(weights_grad + bag * entries + k, tl.sum(product, axis=1), mask=live)


@triton.jit(do_not_specialize=["bags", "entries", "cells"])
def _max_forward(
    table, indices, out, winners, bags, entries, cells, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    bag, channel, live, place, inside = _tile(bags, channels, ROWS, CHANNELS)
    best = tl.full((ROWS, CHANNELS), float("-inf"), tl.float32)
    winner = tl.full((ROWS, CHANNELS), -1, tl.int64)
    for k in range(entries):
        cell, valid = _entry(indices, bag, live, k, entries, cells)
        rows = cell[:, None] * channels + channel[None, :]
        value = tl.load(table + rows, mask=inside & valid[:, None], other=float("-inf")).to(tl.float32)
        better = value > best
        best = tl.where(better, value, best)
        winner = tl.where(better, cell[:, None], winner)
    tl.store(out + place, tl.where(winner < 0, 0.0, best), mask=inside)
    tl.store(winners + place, winner, mask=inside)


@triton.jit
def scatter(pointer, value, mask, scale, FIXED_POINT: tl.constexpr):
    """Add to memory that other programs add to as well: in float32, or in integers, whose sum knows no order."""
    if FIXED_POINT:
        tl.atomic_add(pointer, (value * tl.load(scale)).to(tl.int64), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(pointer, value, mask=mask, sem="relaxed")


class Accumulator:
    """Where programs add up in parallel, [rows, channels]: float32, or int64 where PyTorch is asked for determinism.

    Float32 atomics sum in whatever order the programs arrive. Integers know no order: under
    torch.use_deterministic_algorithms(True) every term is rounded to a multiple of 1 / scale, the finest that cannot
    overflow when `terms` terms, each at most the product of the largest of every factor, meet in one place. With a
    million terms that is 2^-42 of the largest: finer than float32. It costs twice the memory and slower atomics. A
    factor that is not finite makes every sum not finite.
    """

    def __init__(self, rows: int, channels: int, terms: int, *factors: Tensor | None):
        device = next(f.device for f in factors if f is not None)
        self.fixed_point = torch.are_deterministic_algorithms_enabled()
        self.sums = torch.zeros(rows, channels, dtype=torch.int64 if self.fixed_point else torch.float32, device=device)
        self.scale: Tensor | None = None
        if self.fixed_point:
            largest = [f.abs().amax().float().log2() for f in factors if f is not None]
            self.scale = (62 - log2(terms) - sum(largest[1:], largest[0])).floor().clamp(max=100).exp2()

    def result(self, dtype: torch.dtype) -> Tensor:
        """The sums [rows, channels]."""
        return (self.sums if self.scale is None else self.sums / self.scale).to(dtype)


def tile(channels: int) -> dict[str, int]:
    """Launch settings for so many channels."""
    width = min(triton.next_power_of_2(channels), CHANNELS)
    warps = max(ROWS * width // (32 * VALUES), 1)
    return {"ROWS": ROWS, "CHANNELS": width, "num_warps": warps, "enable_fp_fusion": True}


def grid(rows: int, channels: int) -> tuple[int, int]:
    """Programs for so many rows and channels."""
    return triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS)


@torch.library.custom_op("detector::weighted_bag", mutates_args=())
def _weighted_bag(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    (bags, entries), (cells, channels) = indices.shape, table.shape
    out = table.new_empty(bags, channels)
    if out.numel():
        _bag_forward[grid(bags, channels)](
            table.contiguous(), indices.contiguous(), weights.contiguous(), out,
            bags, entries, cells, channels, **tile(channels),
        )  # fmt: skip
    return out


@_weighted_bag.register_fake
def _(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return table.new_empty(indices.shape[0], table.shape[1])


@torch.library.custom_op("detector::weighted_bag_table_gradient", mutates_args=())
def _table_gradient(grad: Tensor, indices: Tensor, weights: Tensor, cells: int) -> Tensor:
    (bags, entries), channels = indices.shape, grad.shape[1]
    if grad.numel() == 0 or entries == 0:
        return grad.new_zeros(cells, channels)
    total = Accumulator(cells, channels, bags * entries, grad, weights)
    _bag_table_gradient[grid(bags, channels)](
        grad.contiguous(), indices.contiguous(), weights.contiguous(), total.sums, total.scale,
        bags, entries, cells, channels, total.fixed_point, **tile(channels),
    )  # fmt: skip
    return total.result(grad.dtype)


@_table_gradient.register_fake
def _(grad: Tensor, indices: Tensor, weights: Tensor, cells: int) -> Tensor:
    return grad.new_empty(cells, grad.shape[1])


@torch.library.custom_op("detector::weighted_bag_weights_gradient", mutates_args=())
def _weights_gradient(grad: Tensor, table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    (bags, entries), (cells, channels) = indices.shape, table.shape
    if grad.numel() == 0 or entries == 0:
        return torch.zeros_like(weights)
    out = torch.empty_like(weights, memory_format=torch.contiguous_format)
    _bag_weights_gradient[grid(bags, 1)](
        grad.contiguous(), table.contiguous(), indices.contiguous(), out, bags, entries, cells, channels,
        **tile(channels),
    )  # fmt: skip
    return out


@_weights_gradient.register_fake
def _(grad: Tensor, table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    table, indices, weights = inputs
    ctx.cells = table.shape[0]
    ctx.save_for_backward(table if ctx.needs_input_grad[2] else None, indices, weights)


def _backward(ctx, grad):
    table, indices, weights = ctx.saved_tensors
    return (
        _table_gradient(grad, indices, weights, ctx.cells) if ctx.needs_input_grad[0] else None,
        None,
        _weights_gradient(grad, table, indices, weights) if ctx.needs_input_grad[2] else None,
    )


_weighted_bag.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("detector::max_bag", mutates_args=())
def _max_bag(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    (bags, entries), (cells, channels) = indices.shape, table.shape
    out = table.new_empty(bags, channels)
    winners = torch.empty(bags, channels, dtype=torch.int64, device=table.device)
    if out.numel():
        _max_forward[grid(bags, channels)](
            table.contiguous(), indices.contiguous(), out, winners,
            bags, entries, cells, channels, **tile(channels),
        )  # fmt: skip
    return out, winners


@_max_bag.register_fake
def _(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    shape = (indices.shape[0], table.shape[1])
    return table.new_empty(shape), table.new_empty(shape, dtype=torch.int64)


def _save_max(ctx, inputs, output):
    ctx.cells = inputs[0].shape[0]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_max(ctx, grad, _):
    (winners,) = ctx.saved_tensors
    dtype = grad.dtype
    grad = grad.float().masked_fill(winners < 0, 0)
    total = grad.new_zeros(ctx.cells, grad.shape[1])
    if ctx.cells:
        total = total.scatter_add(0, winners.clamp(min=0), grad)
    return total.to(dtype), None


_max_bag.register_autograd(_backward_max, setup_context=_save_max)


def _check(table: Tensor, indices: Tensor, weights: Tensor | None = None) -> None:
    if table.ndim != 2 or table.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"table must be [cells, C] in float32, bfloat16 or float16, got {list(table.shape)} {table.dtype}"
        )
    if indices.ndim != 2 or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be [B, K] int32 or int64, got {list(indices.shape)} {indices.dtype}")
    if weights is not None and (weights.shape != indices.shape or not weights.is_floating_point()):
        raise ValueError(
            f"weights must be {list(indices.shape)} like indices and floating point, "
            f"got {list(weights.shape)} {weights.dtype}"
        )
    for name, tensor in (("indices", indices), ("weights", weights)):
        if tensor is not None and tensor.device != table.device:
            raise ValueError(f"{name} must be on {table.device} like the table, got {tensor.device}")


def weighted_bag_cuda(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum_k weights[b, k] * table[indices[b, k]], differentiable in the table and in the weights.

    Args:
        table: [T, C] float32, bfloat16 or float16.
        indices: [B, K] int32 or int64. Entries outside 0..T-1 are left out, and never read.
        weights: [B, K] floating point.
    Returns: [B, C] in the dtype of the table.
    Raises: ValueError for other shapes, dtypes or devices.
    """
    _check(table, indices, weights)
    return _weighted_bag(table, indices, weights)


def max_bag_cuda(table: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """out[b, c] = max_k table[indices[b, k], c], differentiable in the table: the gradient goes to the first winner.

    Args: as for `weighted_bag_cuda`. NaN never wins.
    Returns: the maxima [B, C], 0 for a bag without entries, and the winning cells [B, C] int64, -1 for such a bag.
    """
    _check(table, indices)
    return _max_bag(table, indices)
