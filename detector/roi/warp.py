"""RoI Warp ('Instance-aware semantic segmentation via multi-task network cascades', Dai et al. 2016, section 3.2).

The RoI is rounded to cells as in RoI pooling, then cropped with bilinear interpolation: RoI Align on a quantised RoI,
the step between the two in the ablation of 'Mask R-CNN' (table 2c). With the output as large as the quantised RoI it
is the plain crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detector.roi.align import Grid, RoIAlign
from detector.roi.pool import round_half_away


class RoIWarp(RoIAlign):
    """RoI Warp.

    Args:
        output_size: int or (h, w).
        sampling_ratio: points per bin and axis, 0 is adaptive.
        reduction: of the points, "avg" or "max".

    Corners are rounded to the nearest cell, halves away from zero; the end cell is included and the extent is at least
    one cell, as in Caffe's RoI pooling. Gradients reach the features; the rounding has none for the boxes.
    """

    def __init__(self, output_size: int | Sequence[int], sampling_ratio: int = 1, reduction: str = "avg"):
        super().__init__(output_size, sampling_ratio, aligned=True, reduction=reduction)

    def grid(self, start: Tensor, end: Tensor, bins: int) -> Grid:
        start, end = round_half_away(start), round_half_away(end)
        return super().grid(start, torch.maximum(end, start) + 1, bins)
