"""Rotated RoI Align, and the learner that rotates RoIs ('Learning RoI Transformer for oriented object detection in
aerial images', Ding et al. 2019, section 3).

    out[i, j] = mean over s x s points of f(c + Rot(angle) p),    p the points of RoI Align about the RoI's centre c

Rot turns x towards y, clockwise as one sees it, by `angle` radians. Where RoIs come without one, a fully connected
layer predicts t from the RoI that RoI Align pools, and the paper's equation 1 makes a rotated RoI of it:

    cx' = cx + t_x w,  cy' = cy + t_y h,  w' = w exp(t_w),  h' = h exp(t_h),  angle = 2 pi t_angle.

Dimensions: R RoIs, C channels, h x w bins, s points per bin and axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi

import torch
from torch import Tensor, nn

from detector.ops.checks import check_counts
from detector.ops.layers import init_zero
from detector.roi.align import RoIAlign
from detector.roi.bag import pool_cells
from detector.roi.base import RoIOp, check_inputs
from detector.roi.geometry import FAR, at_points, group_points, locate
from detector.structures import RoIFeatures

LARGEST = log(1000 / 16)  # t_w and t_h at most, as of box deltas


class RotatedRoIAlign(RoIOp):
    """RoI Align of rotated RoIs.

    Args:
        output_size: int or (h, w).
        channels: C of the features, for the learner; None: RoIs must come with an angle.
        sampling_ratio: points per bin and axis, at least 1.

    `forward` takes RoIs [R, 5] as every method, or rotated ones [R, 6] = (batch_index, cx, cy, width, height, angle).
    The learner starts at zero, and the method as RoIAlign. Gradients reach features and RoIs, the angle too.
    """

    takes_angles = True

    def __init__(self, output_size: int | Sequence[int], channels: int | None = None, sampling_ratio: int = 2):
        super().__init__(output_size)
        check_counts(sampling_ratio=sampling_ratio)
        self.align = RoIAlign(output_size, sampling_ratio)
        self.learner: nn.Linear | None = None
        if channels is not None:
            self.learner = nn.Linear(channels * self.output_size[0] * self.output_size[1], 5)
            init_zero(self.learner)

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides, angles=True)
        if rois.shape[1] == 5:
            rois = self.learn(features, rois, levels, strides)
        return RoIFeatures(self.pool(features, rois, levels, strides))

    def learn(self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]) -> Tensor:
        """Rotated RoIs [R, 6] of RoIs [R, 5]."""
        if self.learner is None:
            raise ValueError(
                f"rois must be [R, 6], with an angle, for a method without channels, got {list(rois.shape)}"
            )
        t = self.learner(self.align(features, rois, levels, strides).features.flatten(1))
        rois = rois.to(torch.promote_types(rois.dtype, torch.float32))
        t, sides = t.to(rois.dtype), rois[:, 3:] - rois[:, 1:3]
        sides = torch.where(sides.abs() < FAR, sides, 0)  # or t's gradient were not finite; their centres lie nowhere
        centres = (rois[:, 1:3] + rois[:, 3:]) / 2 + t[:, :2] * sides
        return torch.cat([rois[:, :1], centres, sides * t[:, 2:4].clamp(max=LARGEST).exp(), 2 * pi * t[:, 4:]], 1)

    def pool(self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]) -> Tensor:
        """[R, C, h, w] of rotated RoIs [R, 6]."""
        upright = torch.cat([rois[:, :1], rois[:, 1:3] - rois[:, 3:5] / 2, rois[:, 1:3] + rois[:, 3:5] / 2], 1)
        regions, (h, w), s = locate(features, upright, levels, strides), self.output_size, self.align.sampling_ratio
        x1, y1, x2, y2 = regions.boxes[:, :, None, None].unbind(1)  # [R, 1, 1]
        steps_y, steps_x = (
            (torch.arange(n * s, dtype=x1.dtype, device=x1.device) + 0.5) / (n * s) - 0.5 for n in (h, w)
        )
        x, y = steps_x * (x2 - x1), steps_y[:, None] * (y2 - y1)  # about the centre, [R, 1, w * s] and [R, h * s, 1]
        angle = rois[:, 5].to(regions.boxes.dtype)
        angle = torch.where(angle.isfinite(), angle, 0)[:, None, None]
        cos, sin = angle.cos(), angle.sin()
        x, y = x * cos - y * sin + (x1 + x2) / 2 - 0.5, x * sin + y * cos + (y1 + y2) / 2 - 0.5
        rows, columns = at_points(group_points(x, h, w), group_points(y, h, w), regions)
        return pool_cells(features, regions, rows._replace(weights=rows.weights / (s * s)), columns)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sampling_ratio={self.align.sampling_ratio}"
