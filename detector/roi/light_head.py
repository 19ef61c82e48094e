"""The thin position-sensitive maps of 'Light-Head R-CNN' (Li et al. 2017, section 3.2).

Instead of R-FCN's 1 x 1 layer, a large separable convolution makes D * p * p channels with a small D, 10 in the paper:

    maps = conv_1xk(conv_kx1(f)) + conv_kx1(conv_1xk(f))

which position-sensitive RoI Align pools. Dimensions: C channels, D output channels, p x p groups, k kernel size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detector.ops.checks import require
from detector.roi.position_sensitive import PositionSensitiveRoIAlign


class LightHeadRoIAlign(PositionSensitiveRoIAlign):
    """Position-sensitive RoI Align of thin maps.

    Args:
        output_size, channels, out_channels, group_size: see PositionSensitive; by default 10 channels for 7 x 7 groups.
        middle_channels: between the two convolutions of a branch, 64 in the paper's S, 256 in its L.
        kernel: k, odd. sampling_ratio: points per bin and axis, 0 is adaptive.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        out_channels: int = 10,
        group_size: int | Sequence[int] | None = 7,
        middle_channels: int = 64,
        kernel: int = 15,
        sampling_ratio: int = 2,
    ):
        super().__init__(output_size, sampling_ratio, channels, out_channels, group_size)
        self.maps = LargeSeparableConv(channels, middle_channels, out_channels * self.groups, kernel)


class LargeSeparableConv(nn.Module):
    """k x 1 then 1 x k, plus 1 x k then k x 1, without a nonlinearity ('Large kernel matters', Peng et al. 2017)."""

    def __init__(self, channels: int, middle_channels: int, out_channels: int, kernel: int):
        super().__init__()
        require(kernel % 2 == 1, "kernel", kernel, "odd")
        sizes = (kernel, 1), (1, kernel)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, middle_channels, first, padding="same"),
                nn.Conv2d(middle_channels, out_channels, second, padding="same"),
            )
            for first, second in (sizes, sizes[::-1])
        )

    def forward(self, features: Tensor) -> Tensor:
        """[N, out_channels, H, W] of features [N, channels, H, W]."""
        down_first, along_first = self.branches
        return down_first(features) + along_first(features)
