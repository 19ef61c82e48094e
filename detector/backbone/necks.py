"""Necks: from the backbone's maps to the levels that RPN and heads read.

    FPN          a top-down path (Lin et al. 2017)
    PAFPN        and a second, bottom-up path after it (PANet, Liu et al. 2018, section 3.1):
                     n_2 = p_2        n_{i+1} = conv(conv_stride_2(n_i) + p_{i+1})
    SingleLevel  no pyramid: one map, as in Faster R-CNN before FPN ("C4" and dilated "DC5" models)

Dimensions: N images, L levels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detector.ops.layers import conv_block, conv_layout, init_uniform


class FPN(nn.Module):
    """Lateral 1 x 1 convolutions, a top-down sum, and a 3 x 3 convolution per level.

    Args:
        in_channels, strides: of the backbone's maps, finest first.
        out_channels: C of every level.
        norm: norm by name after each convolution, or None.
        top: one more level for the RPN's largest anchors: 'max_pool' takes every second cell of the last one, 'conv'
            convolves it at stride 2 (the last of `output`), 'none' adds nothing.

    Attributes: out_channels; strides of all levels; roi_levels, how many of them, the finest, RoIs are assigned to.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int = 256,
        norm: str | None = None,
        top: str = "max_pool",
    ):
        super().__init__()
        if top not in ("max_pool", "conv", "none"):
            raise ValueError(f"top={top!r}: expected 'max_pool', 'conv' or 'none'")
        self.lateral = nn.ModuleList(conv_block(c, out_channels, 1, norm, relu=False) for c in in_channels)
        self.output = nn.ModuleList(conv_block(out_channels, out_channels, 3, norm, relu=False) for _ in in_channels)
        if top == "conv":
            self.output.append(conv_block(out_channels, out_channels, 3, norm, relu=False, stride=2))
        self.top = top
        self.out_channels = out_channels
        self.roi_levels = len(strides)
        self.strides = list(strides) if top == "none" else [*strides, 2 * strides[-1]]
        init_uniform(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [N, C, Hl, Wl], finest first, of the backbone's maps."""
        levels = self.merge(maps)
        if self.top == "max_pool":
            levels.append(levels[-1][:, :, ::2, ::2])
        elif self.top == "conv":
            levels.append(self.output[-1](levels[-1]))
        return levels

    def merge(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The levels that the maps have one by one, before any top level."""
        merged = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        for i in range(len(merged) - 1, 0, -1):
            merged[i - 1] = merged[i - 1] + F.interpolate(merged[i], size=merged[i - 1].shape[-2:], mode="nearest")
        return [output(conv_layout(x)) for output, x in zip(self.output, merged)]


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
        init_uniform(self)

    def merge(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [N, C, Hl, Wl], one per map of the backbone."""
        levels = super().merge(maps)
        for i, downsample in enumerate(self.downsample):
            levels[i + 1] = levels[i + 1] + downsample(levels[i])
        return [levels[0], *(conv(level) for conv, level in zip(self.bottom_up, levels[1:]))]


class SingleLevel(nn.Module):
    """Pass the backbone's last map on.

    Args:
        in_channels, strides: of the backbone's maps.

    Attributes: out_channels; strides, of that one level; roi_levels, 1.
    """

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int]):
        super().__init__()
        self.out_channels, self.strides, self.roi_levels = in_channels[-1], [strides[-1]], 1

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """[the last of the maps [N, C, H, W]]"""
        return [maps[-1]]
