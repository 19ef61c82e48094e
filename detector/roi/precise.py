"""Precise RoI pooling ('Acquisition of localization confidence', IoU-Net, Jiang et al. 2018, section 3.3).

    out[i, j] = integral of f over bin (i, j) / area of the bin,    f(x, y) = sum of IC(x, u) IC(y, v) cell[v, u]

with IC(x, u) = max(0, 1 - |x - u|) the bilinear kernel: nothing is rounded or sampled, and the result is
continuously differentiable in the corners of the box. The integral of the kernel is known, so the weight of a row is
that integral over the bin's extent, and likewise of a column.
Dimensions: R RoIs, h x w bins, K rows or columns that a bin touches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detector.roi.bag import pool_cells
from detector.roi.base import RoIOp, check_inputs
from detector.roi.geometry import Axis, cells_between, locate
from detector.structures import RoIFeatures


class PreciseRoIPool(RoIOp):
    """Precise RoI pooling.

    Args:
        output_size: int or (h, w).
        aligned: whether cell i has its centre at i + 1/2. False is the paper's release: cell i lies at i.

    Outside the map f falls linearly to 0 within one cell. RoIs without area (reversed ones too), with NaN or an
    infinity give 0. Gradients reach the features and the boxes.
    """

    def __init__(self, output_size: int | Sequence[int], aligned: bool = False):
        super().__init__(output_size)
        self.aligned = aligned

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        regions = locate(features, rois, levels, strides)
        x1, y1, x2, y2 = (regions.boxes - (0.5 if self.aligned else 0)).unbind(1)
        rows, row_weights, y_used = integral(y1, y2, self.output_size[0], regions.heights)
        columns, column_weights, x_used = integral(x1, x2, self.output_size[1], regions.widths)
        y = Axis(rows[:, :, None, None], row_weights[:, :, None, None], y_used)
        x = Axis(columns[:, None, :, None], column_weights[:, None, :, None], x_used)
        return RoIFeatures(pool_cells(features, regions, y, x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, aligned={self.aligned}"


def integral(start: Tensor, end: Tensor, bins: int, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells [R, bins, K] int32, the mean of each one's kernel over the bin, and the most cells of a RoI's bins, [R]."""
    some = end > start
    end = torch.where(some, end, start + 1)
    bin_size = ((end - start) / bins)[:, None]
    low = start[:, None] + torch.arange(bins, device=start.device) * bin_size
    high = low + bin_size
    first = low.detach().clamp(min=0).minimum(size[:, None]).floor().int()
    last = high.detach().clamp(min=-1).minimum(size[:, None]).ceil().int() + 1
    cells, there, used = cells_between(first, last.minimum(size[:, None]), size)
    weights = kernel_integral(high[..., None] - cells) - kernel_integral(low[..., None] - cells)
    return cells, torch.where(there & some[:, None, None], weights / bin_size[..., None], 0), used


def kernel_integral(t: Tensor) -> Tensor:
    """Integral of max(0, 1 - |u|) over u from minus infinity to t."""
    t = t.clamp(-1, 1)
    return 0.5 + t - 0.5 * t * t.abs()
