"""The primitive behind the RoI methods: an output bin is a weighted sum, or the maximum, of some cells.

Dimensions: N images, L levels, R RoIs, C channels, h x w output bins, B bags (bins of all RoIs), K cells in a bag.

See a map as a table of cells [N*H*W, C], a view if it is channels_last: a bin is a bag of rows of that table. On the
CPU `F.embedding_bag` computes it, vectorised over the channels, with gradients to the table and to the weights, and so
to offsets, modulation and boxes. On a GPU a Triton kernel does the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from detector.roi.dispatch import choose_path
from detector.roi.geometry import Axis, Regions, per_level

CHUNK = 1 << 22
"""Cells read in one call: bounds the indices and weights in memory to about 50 MB, whatever the RoIs."""


def weighted_bag(table: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """out[b] = sum over k of weights[b, k] * table[indices[b, k]], summed in float32 or better.

    Args:
        table: [cells, C] floating point. indices: [B, K] int32 or int64, 0..cells-1. weights: [B, K] floating point.
    Returns: [B, C] in the dtype of the table, differentiable in the table and the weights.
    """
    if len(indices) == 0:
        return table[:0] * weights.sum().to(table.dtype)  # both still get a gradient, of zero
    if indices.shape[1] == 0:
        return table.new_zeros(len(indices), table.shape[1])
    if choose_path(table, ("triton", "bag")) == "triton":
        from detector.roi.triton_bag import weighted_bag_cuda

        return weighted_bag_cuda(table, indices, weights)
    dtype = torch.promote_types(table.dtype, torch.float32)
    return F.embedding_bag(indices, table.to(dtype), per_sample_weights=weights.to(dtype), mode="sum").to(table.dtype)


def max_bag(table: Tensor, indices: Tensor, valid: Tensor) -> Tensor:
    """out[b] = maximum over the valid k of table[indices[b, k]], per channel; 0 where none is valid.

    The gradient goes to the first cell that attains the maximum.

    Args:
        table: [cells, C]. indices: [B, K] int32 or int64, 0..cells-1. valid: [B, K] bool.
    Returns: [B, C], differentiable in the table.
    """
    if indices.numel() == 0:
        return table[:0].expand(0, -1) if len(indices) == 0 else table.new_zeros(len(indices), table.shape[1])
    counts = valid.sum(1)
    offsets = (counts.cumsum(0) - counts).to(indices.dtype)
    return F.embedding_bag(indices[valid], table, offsets, mode="max")


def as_table(feature: Tensor) -> Tensor:
    """[N, C, H, W] as [N*H*W, C]: a view of a channels_last map, a copy of a contiguous one."""
    return feature.permute(0, 2, 3, 1).reshape(-1, feature.shape[1])


def pool_cells(features: Sequence[Tensor], regions: Regions, y: Axis, x: Axis) -> Tensor:
    """Sum of the cells of every bin, each weighted with its row's weight times its column's: [R, C, h, w].

    On the CPU level by level, at most CHUNK cells at a time; on a GPU one table holds all levels, for one launch.
    """
    bins = [max(y.cells.shape[d], x.cells.shape[d]) for d in (1, 2)]
    sizes = [len(f) * f.shape[2] * f.shape[3] for f in features]
    if features[0].is_cuda and len(features) > 1:
        table = torch.cat([as_table(f) for f in features])
        start = per_level(regions.levels, [sum(sizes[:i]) for i in range(len(sizes))], torch.int32)
        rows = _pool_rows(table, start, regions, y, x, bins)
    elif len(features) == 1:
        rows = _pool_rows(as_table(features[0]), torch.zeros_like(regions.images), regions, y, x, bins)
    else:
        order = regions.levels.argsort(stable=True)
        parts = order.split(torch.bincount(regions.levels, minlength=len(features)).tolist())
        rows = [
            _pool_rows(as_table(f), torch.zeros_like(part, dtype=torch.int32), *_select(part, regions, y, x), bins)
            for f, part in zip(features, parts)
        ]
        rows = torch.cat(rows).view(len(order), *bins, features[0].shape[1])[order.argsort()]
    return rows.view(len(y.cells), *bins, features[0].shape[1]).permute(0, 3, 1, 2)


def _select(rows: Tensor, regions: Regions, y: Axis, x: Axis) -> tuple[Regions, Axis, Axis]:
    return Regions(*(t[rows] for t in regions)), Axis(*(t[rows] for t in y)), Axis(*(t[rows] for t in x))


def _pool_rows(table: Tensor, start: Tensor, regions: Regions, y: Axis, x: Axis, bins: Sequence[int]) -> Tensor:
    """[R*h*w, C]: the bags of RoIs whose map begins at row `start` [R] of the table."""
    start = start + regions.images * regions.heights * regions.widths
    k = y.cells.shape[3] * y.cells.shape[4] * x.cells.shape[4]
    parts = []
    for chunk in torch.arange(len(start)).split(max(1, CHUNK // (bins[0] * bins[1] * k))):
        at = slice(int(chunk[0]), int(chunk[-1]) + 1) if len(chunk) else slice(0, 0)
        row = start[at, None, None, None, None] + y.cells[at] * regions.widths[at, None, None, None, None]
        indices = row[..., :, None] + x.cells[at][..., None, :]
        weights = y.weights[at][..., :, None] * x.weights[at][..., None, :]
        parts.append(weighted_bag(table, indices.reshape(-1, k), weights.reshape(-1, k)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def pool_max(
    features: Sequence[Tensor], regions: Regions, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]
) -> Tensor:
    """Maximum of the cells of every bin, 0 for a bin without cells: [R, C, h, w].

    Args:
        rows, columns: first cell of every bin and the one past its last, [R, h] and [R, w], within the map.
    """
    (top, bottom), (left, right) = rows, columns
    tall, wide = (bottom - top).amax(1).clamp(min=1), (right - left).amax(1).clamp(min=1)
    # RoIs of one level and of like size together, so that few of a bag's K places stay empty
    order = (regions.levels * (1 << 40) + tall.long() * wide).argsort(descending=True)
    levels, areas = regions.levels[order].tolist(), (tall * wide)[order].tolist()
    tables = [as_table(f) for f in features]
    parts, begin = [], 0
    while begin < len(order):
        end, level = begin, levels[begin]
        limit = begin + max(1, CHUNK // (areas[begin] * top.shape[1] * left.shape[1]))
        while end < min(limit, len(order)) and levels[end] == level and areas[end] * 2 > areas[begin]:
            end += 1
        at = order[begin:end]
        y = top[at, :, None] + torch.arange(int(tall[at].max()), dtype=torch.int32, device=top.device)
        x = left[at, :, None] + torch.arange(int(wide[at].max()), dtype=torch.int32, device=top.device)
        valid = (y < bottom[at, :, None])[:, :, None, :, None] & (x < right[at, :, None])[:, None, :, None, :]
        height, width = features[level].shape[2:]
        row = regions.images[at, None, None] * height + y.clamp(max=height - 1)
        indices = (row * width)[:, :, None, :, None] + x.clamp(max=width - 1)[:, None, :, None, :]
        k = indices.shape[3] * indices.shape[4]
        parts.append(max_bag(tables[level], indices.reshape(-1, k), valid.reshape(-1, k)))
        begin = end
    pooled = torch.cat(parts) if parts else tables[0][:0]
    pooled = pooled.view(len(order), top.shape[1], left.shape[1], tables[0].shape[1])[order.argsort()]
    return pooled.permute(0, 3, 1, 2)
