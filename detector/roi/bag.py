"""The primitive behind the RoI methods: an output bin is a weighted sum, or the maximum, of some cells.

Dimensions: N images, L levels, R RoIs, C channels, h x w output bins, B bags (bins of all RoIs), K cells in a bag.

See a map as a table of cells [N*H*W, C], a view if it is channels_last: a bin is a bag of rows of that table. On the
CPU `F.embedding_bag` computes it, vectorised over the channels, with gradients to the table and to the weights, and so
to offsets, modulation and boxes. On a GPU a Triton kernel does the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from detector.roi.base import choose_path
from detector.roi.geometry import Axis, Regions, per_level
from detector.structures import each

CHUNK = 1 << 23
"""Cells read in one go: bounds the indices, weights and their sorting in memory to about 200 MB, whatever the RoIs."""


def weighted_bag(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum over k of weights[b, k] * table[indices[b, k]], summed in float32 or better.

    Args:
        table: [cells, C] floating point. indices: [B, K] int32 or int64, 0..cells-1. weights: [B, K] floating point.
    Returns: [B, C] in the dtype of the table, differentiable in the table and the weights.
    """
    path = choose_path(table, ("triton", "bag", "plain"))
    if path == "triton":
        from detector.roi.triton_bag import weighted_bag_cuda

        return weighted_bag_cuda(table, indices, weights)
    dtype = torch.promote_types(table.dtype, torch.float32)
    if path == "plain":
        cells = zip(indices.unbind(1), weights.to(dtype).unbind(1))
        return reduce(torch.add, (table[i.long()].to(dtype) * weight[:, None] for i, weight in cells)).to(table.dtype)
    bags = Bags(indices.reshape(-1).int(), torch.arange(len(indices), device=table.device) * indices.shape[1], None)
    return _WeightedSum.apply(len(indices), [bags], table.to(dtype), weights.reshape(-1).to(dtype)).to(table.dtype)


def max_bag(table: Tensor, indices: Tensor, valid: Tensor) -> Tensor:
    """out[b] = maximum over the valid k of table[indices[b, k]], per channel; 0 where none is valid.

    The gradient goes to the first cell that attains the maximum.

    Args:
        table: [cells, C] floating point. indices: [B, K] int32 or int64, 0..cells-1. valid: [B, K] bool.
    Returns: [B, C], differentiable in the table.
    """
    path = choose_path(table, ("triton", "bag", "plain"))
    if path == "triton":
        from detector.roi.triton_bag import max_bag_cuda

        return max_bag_cuda(table, indices.masked_fill(~valid, -1))[0]
    if path == "plain":
        cells = zip(indices.unbind(1), valid.unbind(1))
        values = (torch.where(there[:, None], table[i.long()], -torch.inf) for i, there in cells)
        return reduce(torch.maximum, values).where(valid.any(1, keepdim=True), 0)
    counts = valid.sum(1)
    return _Maximum.apply(len(indices), [Bags(indices[valid].int(), counts.cumsum(0) - counts, None)], table)


def as_table(feature: Tensor) -> Tensor:
    """[N, C, H, W] as [N*H*W, C]: a view of a channels_last map, a copy of a contiguous one."""
    return feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1]).contiguous()


def pool_cells(features: Sequence[Tensor], regions: Regions, y: Axis, x: Axis) -> Tensor:
    """Sum of the cells of every bin, each weighted with its row's weight times its column's: [R, C, h, w]."""
    tables = [as_table(f) for f in features]
    if choose_path(tables[0], ("triton", "bag", "plain")) != "bag":
        parts = [weighted_bag(*bags) for bags in _padded_bags(tables, regions, y, x)]
    else:
        dtype = torch.promote_types(tables[0].dtype, torch.float32)
        tables, parts = [table.to(dtype) for table in tables], []
        for count, bags, weights in _ragged_bags(len(tables), regions, y, x):
            parts.append(_WeightedSum.apply(count, bags, *tables, *(v.to(dtype) for v in weights)))
    return _as_maps(parts, y, x).to(features[0].dtype)


def pool_max(features: Sequence[Tensor], regions: Regions, y: Axis, x: Axis) -> Tensor:
    """Maximum of the cells of every bin, those with a positive weight; 0 for a bin without any: [R, C, h, w]."""
    tables = [as_table(f) for f in features]
    if choose_path(tables[0], ("triton", "bag", "plain")) != "bag":
        padded = _padded_bags(tables, regions, y, x)
        return _as_maps([max_bag(table, indices, weights > 0) for table, indices, weights in padded], y, x)
    parts = []
    for count, bags, weights in _ragged_bags(len(tables), regions, y, x):
        parts.append(_Maximum.apply(count, [_drop(b, v > 0) for b, v in zip(bags, weights)], *tables))
    return _as_maps(parts, y, x)


def _as_maps(parts: list[Tensor], y: Axis, x: Axis) -> Tensor:
    """Rows [R*h*w, C] in parts as [R, C, h, w], channels_last."""
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows.view(-1, *_bins(y, x), rows.shape[1]).permute(0, 3, 1, 2)


def _bins(y: Axis, x: Axis) -> tuple[int, int]:
    return max(y.cells.shape[1], x.cells.shape[1]), max(y.cells.shape[2], x.cells.shape[2])


def max_of_runs(table: Tensor, counts: Tensor) -> Tensor:
    """Maximum per column over runs of `counts` [B] successive rows of the table [rows, C], 0 over none: [B, C]."""
    everything = torch.arange(len(table), dtype=torch.int32, device=table.device)
    return _Maximum.apply(len(counts), [Bags(everything, counts.cumsum(0) - counts, None)], table)


class Bags(NamedTuple):
    """The bags that read one table, one after another."""

    indices: Tensor  # [entries] int32
    offsets: Tensor  # [B] where each bag begins
    rois: Tensor | None  # [r] int64, whose bins they are, B / r each; None for all RoIs in order

    def rows(self) -> Tensor:
        """[B], the row of the result that each bag makes."""
        if self.rois is None:
            return torch.arange(len(self.offsets), device=self.offsets.device)
        bins = len(self.offsets) // max(1, len(self.rois))
        return (self.rois[:, None] * bins + torch.arange(bins, device=self.rois.device)).flatten()

    def owners(self) -> Tensor:
        """[entries], the row of the result that each entry counts into."""
        ends = torch.cat([self.offsets[1:], self.offsets.new_tensor([len(self.indices)])])
        return self.rows().repeat_interleave(ends - self.offsets, output_size=len(self.indices))


class _WeightedSum(torch.autograd.Function):
    """out[b] = sum of weights[e] * table[indices[e]] over the entries e of bag b, for L tables with bags of their own.

    The gradient of a bag is a bag: a cell's is the weighted sum of the gradients of the bins that read it.
    """

    @staticmethod
    def forward(ctx: Any, count: int, bags: Sequence[Bags], *tables_and_weights: Tensor) -> Tensor:
        ctx.bags = bags
        ctx.save_for_backward(*tables_and_weights)
        tables, weights = tables_and_weights[: len(bags)], tables_and_weights[len(bags) :]
        sums = [_embedding_bag(t, b.indices, b.offsets, w) for t, b, w in zip(tables, bags, weights)]
        return _gather(count, bags, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        levels, saved = len(ctx.bags), ctx.saved_tensors
        tables, weights = saved[:levels], saved[levels:]
        grads: list[Tensor | None] = [None] * len(saved)
        grad = grad.contiguous()
        for level, (bags, table, weight) in enumerate(zip(ctx.bags, tables, weights)):
            owners = bags.owners()
            if ctx.needs_input_grad[2 + level]:
                number = torch.int16 if len(table) <= 2**15 else torch.int32  # sorted twice as fast
                cells, order = bags.indices.to(number).sort(stable=True)
                starts = torch.searchsorted(cells, torch.arange(len(table), dtype=number, device=cells.device))
                grads[level] = _embedding_bag(grad, owners[order].int(), starts, weight[order])
            if ctx.needs_input_grad[2 + levels + level]:
                grads[levels + level] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                    grad, table, bags.indices, bags.offsets.int(), owners.int(), 0
                )
        return None, None, *grads


class _Maximum(torch.autograd.Function):
    """out[b] = maximum of table[indices[e]] over the entries e of bag b, for L tables with bags of their own."""

    @staticmethod
    def forward(ctx: Any, count: int, bags: Sequence[Bags], *tables: Tensor) -> Tensor:
        ctx.bags, ctx.shapes, ctx.winners = bags, [table.shape for table in tables], []
        maxima = []
        for table, b in zip(tables, bags):
            if len(b.indices) == 0:
                maxima.append(table.new_zeros(len(b.offsets), table.shape[1]))
                ctx.winners.append(None)
                continue
            value, _, size, winner = torch.embedding_bag(table, b.indices, b.offsets.int(), mode=2)
            maxima.append(value)
            ctx.winners.append((winner, size > 0))
        return _gather(count, bags, maxima)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table_grads = []
        for bags, shape, winners in zip(ctx.bags, ctx.shapes, ctx.winners):
            table_grads.append(grad.new_zeros(shape))
            if winners is not None:
                winner, some = winners
                won = grad if bags.rois is None else grad[bags.rows()]
                table_grads[-1].scatter_add_(0, winner.long() * some[:, None], won * some[:, None])
        return None, None, *table_grads


def _embedding_bag(table: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    if len(offsets) == 0 or len(table) == 0:
        return table.new_zeros(len(offsets), table.shape[1])
    return F.embedding_bag(indices, table, offsets.int(), mode="sum", per_sample_weights=weights)


def _gather(count: int, bags: Sequence[Bags], parts: list[Tensor]) -> Tensor:
    """The levels' results in the order of the RoIs."""
    rois_of = [b.rois for b in bags if b.rois is not None]
    if not rois_of:
        return parts[0]
    out = parts[0].new_empty(count, parts[0].shape[1])
    for rois, part in zip(rois_of, parts):
        if len(rois):
            out.view(sum(map(len, rois_of)), -1).index_copy_(0, rois, part.view(len(rois), -1))
    return out


def runs(costs: Tensor, limit: int) -> list[slice]:
    """Cut a list of costs [R] into runs that add up to at most `limit`, or hold a single one; at least one run."""
    begins, room = [0], limit
    for i, cost in enumerate(costs.tolist()):
        if cost > room and i > begins[-1]:
            begins.append(i)
            room = limit
        room -= cost
    return [slice(a, b) for a, b in zip(begins, [*begins[1:], len(costs)])]


def _ragged_bags(levels: int, regions: Regions, y: Axis, x: Axis) -> Iterator[tuple[int, list[Bags], list[Tensor]]]:
    """Bags that hold no more cells than their RoI uses, CHUNK of them at a time.

    Yields: how many bags, those of each level, and the weights of their entries.
    """
    h, w = _bins(y, x)
    tall, wide = (
        torch.full_like(regions.images, axis.cells.shape[4]) if axis.used is None else axis.used for axis in (y, x)
    )
    for at in runs(h * w * y.cells.shape[3] * tall.long() * wide, CHUNK):
        part = _rows(at, regions, y, x)
        found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(levels)]
        kinds, which = (regions.levels << 40 | tall.long() << 20 | wide)[at].unique(return_inverse=True)
        for i, kind in enumerate(kinds.tolist()):
            rois = (which == i).nonzero()[:, 0]
            own, rows, columns = _rows(rois, *part) if len(kinds) > 1 else part
            rows = Axis(*(t[..., : kind >> 20 & 0xFFFFF] for t in rows[:2]))
            columns = Axis(*(t[..., : kind & 0xFFFFF] for t in columns[:2]))
            found[kind >> 40].append((*_expand(own, rows, columns), rois))
        none = which[:0]
        empty = none.int()[:, None], y.weights.flatten()[:0, None], none
        joined = [_join(groups or [empty], in_order=levels == len(kinds) == 1) for groups in found]
        yield len(which) * h * w, [bags for bags, _ in joined], [weights for _, weights in joined]


def _padded_bags(tables: list[Tensor], regions: Regions, y: Axis, x: Axis) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All levels as one table, with the indices and weights [B, K] of bags that are all as long as the longest.

    For GPUs and exported programs: nothing here waits for the device.
    """
    starts = per_level(regions.levels, [sum(t.shape[0] for t in tables[:i]) for i in range(len(tables))], torch.int32)
    table = tables[0] if len(tables) == 1 else torch.cat(tables)
    h, w = _bins(y, x)
    step = max(1, CHUNK // (h * w * y.cells.shape[3] * y.cells.shape[4] * x.cells.shape[4]))
    for i in range(0, max(1, len(starts)), step):
        at = slice(i, i + step)
        yield table, *_expand(*_rows(at, regions, y, x), starts[at])


def _rows(at: Tensor | slice, regions: Regions, y: Axis, x: Axis) -> tuple[Regions, Axis, Axis]:
    return each(lambda t: t[at], regions), each(lambda t: t[at], y), each(lambda t: t[at], x)


def _join(groups: list[tuple[Tensor, Tensor, Tensor]], in_order: bool) -> tuple[Bags, Tensor]:
    """Bags of several lengths, given as indices [B, K], weights [B, K] and RoIs [r], one after another."""
    indices, weights, rois = zip(*groups)
    counts = torch.cat([i.new_full((len(i),), i.shape[1], dtype=torch.int64) for i in indices])
    offsets = counts.cumsum(0) - counts
    bags = Bags(torch.cat([i.flatten() for i in indices]), offsets, None if in_order else torch.cat(rois))
    return bags, torch.cat([v.flatten() for v in weights])


def _expand(regions: Regions, y: Axis, x: Axis, start: Tensor | int = 0) -> tuple[Tensor, Tensor]:
    """Indices and weights [B, K] of all bags of some RoIs; `start` is the row of the table where their map begins."""
    first = (start + regions.images * regions.heights * regions.widths).view(-1, 1, 1, 1, 1)
    rows = first + y.cells * regions.widths.view(-1, 1, 1, 1, 1)
    indices = rows[..., :, None] + x.cells[..., None, :]
    weights = y.weights[..., :, None] * x.weights[..., None, :]
    k = indices.shape[3] * indices.shape[4] * indices.shape[5]
    return indices.reshape(-1, k), weights.reshape(-1, k)


def _drop(bags: Bags, keep: Tensor) -> Bags:
    """The bags without the entries that are not to be kept."""
    before = F.pad(keep.cumsum(0), (1, 0))  # entries kept before each
    return bags._replace(indices=bags.indices[keep], offsets=before[bags.offsets])
