"""From RoIs in image pixels to cells and weights: the part in which RoI methods differ.

Dimensions: R RoIs, h x w output bins, K cells that a bin reads along one axis, G groups of them.

A cell is one pixel of a feature map. Most methods are separable: the weight of a cell in a bin is the weight of its row
times the weight of its column, so a method is told by two `Axis` values, one for y and one for x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from detector.roi.base import check_fixed

NOWHERE = -9.0  # a point outside every map, even after rounding up to a cell
FAR = 1e18  # pixels; products of two such still fit float32


class Axis(NamedTuple):
    """Which rows (or columns) every bin reads, and with what weight; sizes of 1 in dimensions 1 and 2 broadcast.

    A bin sums over G groups of cells, each the product of K rows and K columns. G is 1 for a grid of points, and the
    number of points where they do not form a grid.
    """

    cells: Tensor  # [R, h or 1, w or 1, G, K] int32, always inside the map
    weights: Tensor  # the same shape, float32 or float64
    used: Tensor | None = None  # [R] int, how many of the K matter to the RoI: those past it have weight 0; None: all


class Regions(NamedTuple):
    """RoIs in the coordinates of the feature map each of them reads."""

    boxes: Tensor  # [R, 4] (x1, y1, x2, y2) in cells, float32 or float64, finite
    images: Tensor  # [R] int32
    levels: Tensor  # [R] int64
    heights: Tensor  # [R] int32, of the map that the RoI reads
    widths: Tensor  # [R] int32


def per_level(levels: Tensor, values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """`values[levels]` as [R], computed on the device of `levels` without waiting for it."""
    result = torch.zeros(levels.shape, dtype=dtype, device=levels.device)
    for level, value in enumerate(values):
        result = torch.where(levels == level, value, result)
    return result.to(dtype)


def locate(features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]) -> Regions:
    """Scale the RoIs to their maps, in float32 (float64 where the features or the RoIs are).

    Batch indices and levels are clamped into their range: nothing is ever read out of bounds. A RoI with NaN, an
    infinity or a coordinate beyond 1e18 pixels is moved to a point outside its map, where every method gives 0.
    """
    dtype = torch.promote_types(torch.promote_types(features[0].dtype, rois.dtype), torch.float32)
    boxes = rois[:, 1:].to(dtype)
    levels = levels.clamp(0, len(features) - 1).long()
    scale = per_level(levels, [1 / stride for stride in strides], dtype)
    known = (boxes.abs() < FAR).all(1, keepdim=True)
    return Regions(
        boxes=torch.where(known, boxes * scale[:, None], NOWHERE),
        images=rois[:, 0].detach().nan_to_num(0).clamp(0, features[0].shape[0] - 1).int(),
        levels=levels,
        heights=per_level(levels, [f.shape[2] for f in features], torch.int32),
        widths=per_level(levels, [f.shape[3] for f in features], torch.int32),
    )


KERNELS = {"bilinear": 2, "bicubic": 4, "lanczos": 6}
"""Cells that each interpolation kernel reads along one axis."""


def interpolate(position: Tensor, size: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """The K cells around a position along one axis, weighted by a kernel of `KERNELS`; see `bilinear` for the rest.

    bicubic: Keys 1981, a = -0.5. lanczos: sinc(t) sinc(t / 3) for |t| < 3 (Duchon 1979), the weights divided by their
    sum. Cells beyond the map count as its outermost ones, so that a constant map stays constant.
    Returns: cells [..., K] int32 and weights [..., K].
    """
    if kernel == "bilinear":
        return bilinear(position, size)
    reach = KERNELS[kernel] // 2
    inside = (position >= -1) & (position <= size)
    position = torch.where(inside, position, 0).clamp(min=0)
    position = torch.minimum(position, (size - 1).to(position.dtype))
    low = position.detach().floor()
    steps = torch.arange(1 - reach, reach + 1, dtype=position.dtype, device=position.device)
    t = (position - low)[..., None] - steps
    if kernel == "bicubic":
        t = t.abs()
        weights = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, ((2.5 - 0.5 * t) * t - 4) * t + 2)
    else:
        weights = torch.where(t.abs() < reach, t.sinc() * (t / reach).sinc(), 0)
        weights = weights / weights.sum(-1, keepdim=True)
    cells = (low[..., None] + steps).int().clamp(min=0)
    return torch.minimum(cells, size[..., None] - 1), weights * inside[..., None]


def bilinear(position: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The two neighbours of a position along one axis, with linear weights.

    Cell i lies at position i. Positions from -1 to `size` read the map, those beyond its outermost cells at the edge
    value; positions further out, NaN included, get weight 0 (the rule of Detectron and torchvision).

    Args:
        position: [...] in cells. size: the map's height or width, broadcastable to it.
    Returns: cells [..., 2] int32 and weights [..., 2].
    """
    last = size - 1
    inside = (position >= -1) & (position <= size)
    position = torch.where(inside, position, 0).clamp(min=0)
    position = torch.minimum(position, last.to(position.dtype))
    low = position.detach().floor()
    upper = position - low
    weights = torch.stack([1 - upper, upper], -1) * inside[..., None]
    low = low.int()
    return torch.stack([low, torch.minimum(low + 1, last)], -1), weights


def at_points(x: Tensor, y: Tensor, regions: Regions, weights: Tensor | None = None) -> tuple[Axis, Axis]:
    """Axes (y, x) of bins that sum, with `weights`, over G points which need not form a grid.

    Args:
        x, y: [R, h, w, G] in cells of the map that each region reads. weights: of the same shape; None: 1 for each.
    """
    rows, row_weights = bilinear(y, regions.heights[:, None, None, None])
    columns, column_weights = bilinear(x, regions.widths[:, None, None, None])
    return Axis(rows, row_weights if weights is None else row_weights * weights[..., None]), Axis(
        columns, column_weights
    )


def group_points(values: Tensor, h: int, w: int) -> Tensor:
    """[R, h * s, w * s] -> [R, h, w, s * s]: the points of each bin."""
    return values.unflatten(2, (w, -1)).unflatten(1, (h, -1)).transpose(2, 3).flatten(3)


def share(extent: Tensor, bins: int) -> Tensor:
    """extent / bins, correctly rounded everywhere: by a number of Python's a GPU multiplies with its reciprocal, which
    can put the edge of a bin on the other side of a whole number."""
    return extent / (extent.new_full((), bins) if extent.is_cuda else bins)


def cells_between(first: Tensor, last: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cells from `first` up to but without `last` [R, ...], as [R, ..., K] with K the most of any bin.

    Returns: cells int32, inside a map of `size` [R]; which of the K there are, bool; and the most of each RoI, [R].
    """
    check_fixed("the number of cells follows the RoI's size")
    counts = (last - first).clamp(min=0)
    used = counts.flatten(1).amax(1).clamp(min=1)
    n = torch.arange(int(used.max()) if len(used) else 1, dtype=torch.int32, device=first.device)
    cells = (first[..., None] + n).clamp(min=0).minimum(size.view(-1, *[1] * first.ndim) - 1)
    return cells, n < counts[..., None], used
