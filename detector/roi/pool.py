"""RoI pooling ('Fast R-CNN', Girshick 2015, section 2.1): the maximum over the cells of every bin of a rounded RoI.

Three ways to round are in use:
    caffe:    corners to the nearest cell (halves away from zero), the end cell included, at least one cell; bin i runs
              from floor(i * size / h) up to ceil((i + 1) * size / h): neighbouring bins can share cells. torchvision's.
    floor:    corners floored, the end cell excluded; bin i from floor(i * size / h) up to
              floor((i + 1) * size / h): every cell is in exactly one bin.
    uniform:  corners floored, the end cell excluded; every bin has floor(size / h) cells, the remainder is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detector.ops.checks import check_choice
from detector.roi.bag import pool_max
from detector.roi.base import RoIOp, check_inputs, choose_path
from detector.roi.geometry import Axis, cells_between, locate, share
from detector.roi.plain import max_between
from detector.structures import RoIFeatures

QUANTIZATIONS = ("caffe", "floor", "uniform")


class RoIPool(RoIOp):
    """RoI max pooling.

    Args:
        output_size: int or (h, w). quantization: "caffe", "floor" or "uniform", see the top of the file.

    Bins without a cell on the map give 0: RoIs outside it, with NaN, and, but for "caffe", reversed RoIs and those
    with fewer cells than bins (in those bins). Gradients reach the features, each from the first maximum of its bin.
    """

    def __init__(self, output_size: int | Sequence[int], quantization: str = "caffe"):
        super().__init__(output_size)
        check_choice("quantization", quantization, QUANTIZATIONS)
        self.quantization = quantization

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        regions = locate(features, rois, levels, strides)
        x1, y1, x2, y2 = regions.boxes.detach().unbind(1)
        rows = bin_ranges(y1, y2, self.output_size[0], regions.heights, self.quantization)
        columns = bin_ranges(x1, x2, self.output_size[1], regions.widths, self.quantization)
        if choose_path(features[0], ("bag", "plain")) == "plain":
            row_ranges, column_ranges = [r[:, :, None] for r in rows], [c[:, None] for c in columns]
            return RoIFeatures(max_between(features, regions, row_ranges, column_ranges))
        y_cells, y_there, y_used = cells_between(*rows, regions.heights)
        x_cells, x_there, x_used = cells_between(*columns, regions.widths)
        y = Axis(y_cells[:, :, None, None], y_there[:, :, None, None].float(), y_used)
        x = Axis(x_cells[:, None, :, None], x_there[:, None, :, None].float(), x_used)
        return RoIFeatures(pool_max(features, regions, y, x))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantization={self.quantization!r}"


def bin_ranges(start: Tensor, end: Tensor, bins: int, size: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """First cell of every bin and the one past its last, [R, bins] int32 each, within a map of `size` [R] cells.

    Where the last is not past the first the bin is empty.
    """
    i = torch.arange(bins + 1, device=start.device)
    if quantization == "caffe":
        start, end = round_half_away(start), round_half_away(end)
        bin_size = share((end - start + 1).clamp(min=1), bins)[:, None]
        edges = i.to(start.dtype)
        low, high = (edges[:-1] * bin_size).floor(), (edges[1:] * bin_size).ceil()
    elif quantization == "floor":
        start, end = start.floor(), end.floor()
        edges = share(i * (end - start).clamp(min=0)[:, None], bins).floor()
        low, high = edges[:, :-1], edges[:, 1:]
    else:
        start, end = start.floor(), end.floor()
        bin_size = share((end - start).clamp(min=0)[:, None], bins).floor()
        low, high = i[:-1] * bin_size, i[1:] * bin_size
    low, high = ((start[:, None] + v).clamp(min=0).minimum(size[:, None]).int() for v in (low, high))
    return low, high


def round_half_away(value: Tensor) -> Tensor:
    """C's round: halves away from zero, unlike torch.round."""
    whole = value.trunc()
    return whole + value.sign() * ((value - whole).abs() >= 0.5)
