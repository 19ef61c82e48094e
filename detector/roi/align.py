"""RoI Align ('Mask R-CNN', He et al. 2017, section 3): no coordinate is rounded, bins are bilinear samples.

    out[i, j] = mean (or max) over s_y x s_x points of f(x, y),
    y = y1 + (i + (n + 1/2) / s_y) * height / h for n = 0..s_y - 1, x likewise

with f the bilinear interpolation of the map. Dimensions: R RoIs, h x w bins, S points per bin along one axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from detector.roi.bag import CHUNK, pool_cells
from detector.roi.base import RoIOp, check_choice, check_inputs
from detector.roi.geometry import Axis, Regions, bilinear, locate
from detector.structures import RoIFeatures


class RoIAlign(RoIOp):
    """RoI Align.

    Args:
        output_size: int or (h, w).
        sampling_ratio: points per bin and axis; 0 is adaptive, ceil(bin size in cells), as in Detectron.
        aligned: whether cell i covers [i, i + 1), with its centre at i + 1/2. False reproduces the first release, which
            is off by half a cell and makes RoIs at least one cell wide.
        reduction: of the points of a bin, "avg" or "max". Points outside the map count with value 0.
        placement: of a point within its sub-cell, "centre" or, at the far end, "edge".

    A RoI that is reversed (x2 < x1) is read backwards (aligned) or as one cell wide (not aligned). In adaptive mode a
    RoI without extent reads nothing and gives 0. Parts outside the map, NaN and infinities give 0. Gradients reach
    the features and, where `rois` asks for one, the boxes.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        sampling_ratio: int = 2,
        aligned: bool = True,
        reduction: str = "avg",
        placement: str = "centre",
    ):
        super().__init__(output_size)
        if not isinstance(sampling_ratio, int) or sampling_ratio < 0:
            raise ValueError(f"sampling_ratio must be an int >= 0 (0 is adaptive), got {sampling_ratio!r}")
        check_choice("reduction", reduction, ("avg", "max"))
        check_choice("placement", placement, ("centre", "edge"))
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.reduction = reduction
        self.placement = placement

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        regions = locate(features, rois, levels, strides)
        if self.reduction == "max":
            return RoIFeatures(self.pool_max(features, regions))
        return RoIFeatures(pool_cells(features, regions, *self.axes(regions)))

    def axes(self, regions: Regions, shift_x: Tensor | None = None, shift_y: Tensor | None = None) -> tuple[Axis, Axis]:
        """Rows and columns that every bin reads, with weights that give the mean of its points.

        Args:
            shift_x, shift_y: [R, h, w], by how much each bin is moved, as a part of the RoI's width and height.
        """
        x1, y1, x2, y2 = regions.boxes.unbind(1)
        y, y_counts = self.points(y1, y2, self.output_size[0])
        x, x_counts = self.points(x1, x2, self.output_size[1])
        y, x = y[:, :, None], x[:, None]  # [R, h, 1, S], [R, 1, w, S]
        if shift_x is not None:
            y = y + (shift_y * (y2 - y1)[:, None, None])[..., None]
            x = x + (shift_x * (x2 - x1)[:, None, None])[..., None]
        rows, row_weights = bilinear(y, regions.heights[:, None, None, None])
        columns, column_weights = bilinear(x, regions.widths[:, None, None, None])
        row_weights, column_weights = mean_weights(row_weights, y_counts), mean_weights(column_weights, x_counts)
        return (
            Axis(rows.flatten(3)[:, :, :, None], row_weights.flatten(3)[:, :, :, None]),
            Axis(columns.flatten(3)[:, :, :, None], column_weights.flatten(3)[:, :, :, None]),
        )

    def pool_max(self, features: Sequence[Tensor], regions: Regions) -> Tensor:
        """[R, C, h, w], the maximum over the points of every bin: every point is a bag of its own."""
        x1, y1, x2, y2 = regions.boxes.unbind(1)
        y, y_counts = self.points(y1, y2, self.output_size[0])
        x, x_counts = self.points(x1, x2, self.output_size[1])
        valid = is_point(y, y_counts)[:, :, None] & is_point(x, x_counts)[:, None]
        y = Axis(*(t.flatten(1, 2)[:, :, None, None] for t in bilinear(y, regions.heights[:, None, None])))
        x = Axis(*(t.flatten(1, 2)[:, None, :, None] for t in bilinear(x, regions.widths[:, None, None])))
        return pool_points_max(features, regions, y, x, self.output_size, valid)

    def points(self, start: Tensor, end: Tensor, bins: int) -> tuple[Tensor, Tensor | int]:
        """Positions [R, bins, S] of the points along one axis, and how many of the S a bin has: [R], or S for all."""
        if self.aligned:
            start, end = start - 0.5, end - 0.5
        size = end - start if self.aligned else (end - start).clamp(min=1)
        bin_size = (size / bins)[:, None, None]
        if self.sampling_ratio:
            counts, most = self.sampling_ratio, self.sampling_ratio
            per_bin = counts
        else:
            counts = (size / bins).detach().ceil().nan_to_num(0, 0, 0).clamp(min=0)
            most = int(counts.max()) if len(counts) else 1
            per_bin = counts.clamp(min=1)[:, None, None]
        i = torch.arange(bins, device=start.device, dtype=start.dtype)[:, None]
        n = torch.arange(most, device=start.device, dtype=start.dtype) + (0.5 if self.placement == "centre" else 1)
        return start[:, None, None] + i * bin_size + n * bin_size / per_bin, counts

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, sampling_ratio={self.sampling_ratio}, aligned={self.aligned}, "
            f"reduction={self.reduction!r}, placement={self.placement!r}"
        )


def is_point(points: Tensor, counts: Tensor | int) -> Tensor:
    """[R, S]: which of the S points of every bin exist."""
    n = torch.arange(points.shape[2], device=points.device)
    return n < (counts[:, None] if isinstance(counts, Tensor) else torch.full_like(points[:, :1, 0], counts))


def pool_points_max(
    features: Sequence[Tensor], regions: Regions, y: Axis, x: Axis, bins: tuple[int, int], valid: Tensor
) -> Tensor:
    """Maximum over the points of every bin, [R, C, h, w]; the gradient goes to the first that attains it.

    Args:
        y, x: one bag per point, [R, h*Sy, 1, 1, 2] and [R, 1, w*Sx, 1, 2]. valid: [R, Sy, Sx], the points that exist.
    """
    h, w = bins

    def pool(start: int, stop: int) -> Tensor:
        part = slice(start, stop)
        points = pool_cells(features, *(type(t)(*(v[part] for v in t)) for t in (regions, y, x)))
        points = points.unflatten(3, (w, -1)).unflatten(2, (h, -1)).transpose(3, 4)  # [r, C, h, w, Sy, Sx]
        points = points.masked_fill(~valid[part, None, None, None], -torch.inf).flatten(4).max(4).values
        return points.masked_fill(~valid[part].any(2).any(1)[:, None, None, None], 0)

    step = max(1, CHUNK // max(1, y.cells.shape[1] * x.cells.shape[2] * features[0].shape[1]))
    parts = [
        checkpoint(pool, i, i + step, use_reentrant=False) for i in range(0, max(1, len(valid)), step)
    ]  # recomputed in the backward pass: the values of all points would be S^2 times the output
    return torch.cat(parts)


def mean_weights(weights: Tensor, counts: Tensor | int) -> Tensor:
    """Divide the weights [R, ..., S, 2] of points by the number of points in a bin, dropping those past the count."""
    if isinstance(counts, int):
        return weights / counts
    counts = counts.view(-1, *[1] * (weights.ndim - 1))
    n = torch.arange(weights.shape[-2], device=weights.device)[:, None]
    return torch.where(n < counts, weights, 0) / counts.clamp(min=1)
