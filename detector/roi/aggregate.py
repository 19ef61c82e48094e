"""Methods that read every level for every RoI, whatever its size; the assigned level is ignored.

- all levels summed: the plainest way not to choose a level;
- GRoIE ('A novel region of interest extraction layer for instance segmentation', Rossi et al. 2020): a convolution on
  each level's result, their sum, then attention over the bins.
Dimensions: R RoIs, C channels, h x w bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detector.roi.align import RoIAlign
from detector.roi.base import RoIOp, check_inputs, make_op
from detector.structures import RoIFeatures


class SumLevels(RoIOp):
    """The sum over all levels of what a RoI method makes of each.

    Args:
        output_size: int or (h, w). channels: C of the features.
        op: factory of the method, RoIAlign with its defaults if None. It must not return offsets.
    """

    def __init__(self, output_size: int | Sequence[int], channels: int, op: Callable[..., RoIOp] | None = None):
        super().__init__(output_size)
        self.op = make_op(op or RoIAlign, output_size, channels, levels=1)

    def output_channels(self, channels: int) -> int:
        return self.op.output_channels(channels)

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        first = torch.zeros_like(levels)
        results = [self.op([f], rois, first, [stride]).features for f, stride in zip(features, strides)]
        return RoIFeatures(self.aggregate(results))

    def aggregate(self, results: list[Tensor]) -> Tensor:
        """[R, C, h, w] from one such result per level."""
        return sum(results[1:], results[0])


class GRoIE(SumLevels):
    """Generic RoI extraction layer: 5 x 5 convolution on every level's result, sum, non-local attention over the bins.

    Args: as SumLevels; kernel: size of the convolution, which all levels share, odd.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        op: Callable[..., RoIOp] | None = None,
        kernel: int = 5,
    ):
        super().__init__(output_size, channels, op)
        channels = self.op.output_channels(channels)
        self.before = nn.Sequential(nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU(inplace=True))
        self.after = NonLocal(channels)

    def aggregate(self, results: list[Tensor]) -> Tensor:
        return self.after(super().aggregate([self.before(result) for result in results]))


class NonLocal(nn.Module):
    """x + W softmax(q k / sqrt(C / 2)) v over the bins, from W = 0 ('Non-local neural networks', Wang et al. 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.project = nn.Conv2d(channels // 2, channels, 1)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        # one head: [R, 1, h*w, C/2]
        query, key, value = (layer(x).flatten(2).mT[:, None] for layer in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.project(mixed.mT.unflatten(2, x.shape[2:]))
