"""RoI Align that looks before it reads: what the RoI holds says by how much to move it.

    (dx, dy) = W * mean of RoIAlign(roi) + b,   out = RoIAlign(roi moved by gamma * (width * dx, height * dy))

Dimensions: R RoIs, C channels, h x w bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detector.roi import RoIAlign, RoIFeatures, RoIOp


class ShiftedRoIAlign(RoIOp):
    """RoI Align of a RoI that is moved as a whole, by an offset learned from its features.

    Args:
        output_size: int or (h, w).
        channels: C of the features.
        sampling_ratio: of RoI Align.
        gamma: scale of the offsets, times the RoI's width and height.
    """

    def __init__(self, output_size: int | Sequence[int], channels: int, sampling_ratio: int = 2, gamma: float = 0.1):
        super().__init__(output_size)
        self.align = RoIAlign(output_size, sampling_ratio)
        self.predictor = nn.Linear(channels, 2)
        nn.init.zeros_(self.predictor.weight)  # it starts as RoI Align
        nn.init.zeros_(self.predictor.bias)
        self.gamma = gamma

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        seen = self.align(features, rois, levels, strides).features.mean((2, 3))  # [R, C]
        offset = self.predictor(seen).to(rois.dtype)  # [R, 2]
        sides = rois[:, 3:] - rois[:, 1:3]
        boxes = rois[:, 1:] + (self.gamma * offset * sides).repeat(1, 2)
        moved = torch.cat([rois[:, :1], boxes], dim=1)
        pooled = self.align(features, moved, levels, strides).features
        return RoIFeatures(pooled, offset[:, :, None, None].expand(-1, -1, *self.output_size))
