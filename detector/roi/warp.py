"""RoI Warp ('Instance-aware semantic segmentation via multi-task network cascades', Dai et al. 2016, section 3.2).

The RoI is rounded to cells as in RoI pooling, then cropped with bilinear interpolation: RoI Align on a quantised RoI,
the step between the two in the ablation of 'Mask R-CNN' (table 2c). With the output as large as the quantised RoI it
is the plain crop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detector.roi.align import RoIAlign
from detector.roi.base import check_inputs
from detector.roi.geometry import per_level
from detector.roi.pool import round_half_away
from detector.structures import RoIFeatures


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

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        dtype = torch.promote_types(torch.promote_types(features[0].dtype, rois.dtype), torch.float32)
        stride = per_level(levels, strides, dtype)[:, None]
        corners = round_half_away(rois[:, 1:].detach().to(dtype) / stride)
        start, end = corners[:, :2], corners[:, 2:]
        quantised = [rois[:, :1].to(dtype), start * stride, (torch.maximum(start, end) + 1) * stride]
        return super().forward(features, torch.cat(quantised, 1), levels, strides)
