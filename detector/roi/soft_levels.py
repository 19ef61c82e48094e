"""Soft RoI selection ('AugFPN', Guo et al. 2020, section 3.3): every level, weighted by place.

    out[i, j] = sum over the levels l of w_l[i, j] x_l[i, j],    w = sigmoid(conv3x3(relu(conv1x1([x_1, ..., x_L]))))

with x_l the RoI pooled from level l. Dimensions: L levels, R RoIs, C channels, h x w bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detector.ops.layers import init_zero
from detector.roi.adaptive_pooling import check_levels
from detector.roi.aggregate import SumLevels
from detector.roi.base import RoIOp


class SoftLevels(SumLevels):
    """The sum over all levels with a weight in (0, 1) per level and bin, predicted from all of them.

    Args:
        output_size, channels, op: as in SumLevels. levels: L, as many as will be fed.

    The last convolution starts at zero, and so all weights at 1/2.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        levels: int = 4,
        op: Callable[..., RoIOp] | None = None,
    ):
        super().__init__(output_size, channels, op)
        channels = self.op.output_channels(channels)
        self.levels = levels
        self.selector = nn.Sequential(
            nn.Conv2d(levels * channels, channels, 1), nn.ReLU(inplace=True), nn.Conv2d(channels, levels, 3, padding=1)
        )
        init_zero(self.selector[-1])

    def aggregate(self, results: list[Tensor]) -> Tensor:
        check_levels(results, self.levels)
        weights = self.selector(torch.cat(results, dim=1)).sigmoid()  # [R, L, h, w]
        return super().aggregate([w[:, None] * x for w, x in zip(weights.unbind(1), results)])
