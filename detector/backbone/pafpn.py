"""Path aggregation (PANet, Liu et al. 2018, section 3.1): a second, bottom-up path after the pyramid's top-down one.

    n_2 = p_2        n_{i+1} = conv(conv_stride_2(n_i) + p_{i+1})

Dimensions: N images, L levels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detector.backbone.fpn import FPN
from detector.layers import conv_block


class PAFPN(FPN):
    """FPN with a bottom-up path; arguments and attributes are FPN's.

    As in mmdetection, the sum that goes on upwards is the one before its 3 x 3 convolution, and no convolution is
    followed by a ReLU.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int = 256,
        norm: str | None = None,
        top: str = "max_pool",
    ):
        super().__init__(in_channels, strides, out_channels, norm, top)

        def convs(stride: int) -> nn.ModuleList:
            blocks = (conv_block(out_channels, out_channels, 3, norm, False, stride) for _ in in_channels[1:])
            return nn.ModuleList(blocks)

        self.downsample, self.bottom_up = convs(stride=2), convs(stride=1)
        self.init_convs()

    def merge(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [N, C, Hl, Wl], one per map of the backbone."""
        levels = super().merge(maps)
        for i, downsample in enumerate(self.downsample):
            levels[i + 1] = levels[i + 1] + downsample(levels[i])
        return [levels[0], *(conv(level) for conv, level in zip(self.bottom_up, levels[1:]))]
