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
import torch.nn.functional as F
from torch import Tensor

from detector.roi.bag import pool_cells
from detector.roi.base import RoIOp, check_inputs, choose_path
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
        if choose_path(features[0], ("triton", "bag", "plain")) == "plain":
            sums = [F.pad(f.double().cumsum(2).cumsum(3), (1, 0, 1, 0)) for f in features]  # of all cells before each
            regions = regions._replace(heights=regions.heights + 1, widths=regions.widths + 1)
            rows, row_weights = of_sums(y1, y2, self.output_size[0], regions.heights)
            columns, column_weights = of_sums(x1, x2, self.output_size[1], regions.widths)
            y = Axis(rows[:, :, None, None], row_weights[:, :, None, None])
            x = Axis(columns[:, None, :, None], column_weights[:, None, :, None])
            return RoIFeatures(pool_cells(sums, regions, y, x).to(features[0].dtype))
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


def of_sums(start: Tensor, end: Tensor, bins: int, size: Tensor) -> tuple[Tensor, Tensor]:
    """Cells [R, bins, 6] int32 of a map of running sums, `size` [R] long, and their weights.

    As `integral`, whose count of cells follows the RoI. With S_k the sum of the cells before k, the integral up to t is
        sum over u of K(t - u) cell_u  =  sum over k of (K(t - k + 1) - K(t - k)) S_k,    K the kernel's integral,
    where three terms are not 0, those at k = floor(t), floor(t) + 1 and floor(t) + 2. In float64, for sums are large.
    """
    start, end = start.double(), end.double()
    some = (end > start)[:, None]
    bin_size = torch.where(some, (end - start)[:, None] / bins, 1)
    t = start[:, None] + torch.arange(bins + 1, device=start.device) * bin_size
    k = t.floor()[..., None] + torch.arange(3, device=t.device)
    weights = kernel_integral(t[..., None] - k + 1) - kernel_integral(t[..., None] - k)
    weights = torch.where(some, 1 / bin_size, 0)[..., None] * weights
    cells = k.clamp(min=0).minimum(size[:, None, None] - 1).int()
    return torch.cat([cells[:, 1:], cells[:, :-1]], 2), torch.cat([weights[:, 1:], -weights[:, :-1]], 2)


def kernel_integral(t: Tensor) -> Tensor:
    """Integral of max(0, 1 - |u|) over u from minus infinity to t."""
    t = t.clamp(-1, 1)
    return 0.5 + t - 0.5 * t * t.abs()
