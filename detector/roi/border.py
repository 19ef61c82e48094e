"""Border features ('BorderDet', Qiu et al. 2020, section 3.2): the maxima along the four sides of a box.

    b[c] = max over k = 0..N-1 of I_side[c](point k of the side),    point k of the left side: (x1, y1 + k height / N)

and likewise for the other sides, with I = relu(1 x 1 convolution of the map), which has channels of its own for each
side. There they are put beside the feature of the box's centre, and a 1 x 1 layer makes one of them all; here beside
what a RoI method pools:

    out = x + U [b_left, b_top, b_right, b_bottom]    in every bin.

The release's instance norm is left out: its statistics are those of the whole padded map.
Dimensions: N images, R RoIs, C channels, D of them for each side, P points per side, h x w bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detector.ops.checks import check_counts
from detector.ops.layers import init_zero
from detector.roi.base import RoIOp, check_inputs
from detector.roi.geometry import Regions, at_points, locate
from detector.roi.position_sensitive import pool_groups
from detector.roi.wrapped import WrappedRoIOp
from detector.structures import RoIFeatures


class BorderAlign(WrappedRoIOp):
    """A pooled RoI and the maxima along its sides.

    Args:
        output_size: int or (h, w). channels: C of the features.
        points: of a side, 10 in the paper.
        border_channels: D, 128 in the paper's regression branch and 256 in its classification branch.
        op: factory of the method that pools the RoI, RoIAlign with its defaults if None. It must not return offsets.

    U starts at zero, and the method as `op`. Points outside the map read 0. Gradients reach features and boxes.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        points: int = 10,
        border_channels: int = 128,
        op: Callable[..., RoIOp] | None = None,
    ):
        super().__init__(output_size, channels, op)
        check_counts(points=points, border_channels=border_channels)
        self.points = points
        self.maps = nn.Conv2d(channels, 4 * border_channels, 1)
        self.mix = nn.Linear(4 * border_channels, self.output_channels(channels), bias=False)
        init_zero(self.mix)

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        own = self.op(features, rois, levels, strides).features
        maps = [self.maps(f).relu() for f in features]
        borders = self.borders(maps, locate(maps, rois, levels, strides))
        return RoIFeatures(own + self.mix(borders.flatten(1))[..., None, None])

    def borders(self, maps: Sequence[Tensor], regions: Regions) -> Tensor:
        """[R, D, 4], the maxima along left, top, right and bottom of maps with D * 4 channels: d 4 + side."""
        y, x = at_points(*self.side_points(regions), regions)
        group = torch.arange(4, dtype=torch.int32, device=x.cells.device)[None, :, None]
        return pool_groups(maps, regions, y, x, group, 4).amax(3)

    def side_points(self, regions: Regions) -> tuple[Tensor, Tensor]:
        """x and y [R, 4, P, 1] of the sides' points, in cells."""
        x1, y1, x2, y2 = (regions.boxes - 0.5)[:, :, None].unbind(1)  # [R, 1]
        steps = torch.arange(self.points, dtype=x1.dtype, device=x1.device) / self.points
        along_x, along_y, still = x1 + steps * (x2 - x1), y1 + steps * (y2 - y1), torch.zeros_like(steps)
        x = torch.stack([x1 + still, along_x, x2 + still, along_x], 1)
        y = torch.stack([along_y, y1 + still, along_y, y2 + still], 1)
        return x[..., None], y[..., None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, points={self.points}"
