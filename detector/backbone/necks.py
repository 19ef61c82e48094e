"""Necks: from the backbone's maps to the levels that RPN and heads read.

    FPN            a top-down path (Lin et al. 2017)
    PAFPN          and a second, bottom-up path after it (PANet, Liu et al. 2018, section 3.1):
                       n_2 = p_2        n_{i+1} = conv(conv_stride_2(n_i) + p_{i+1})
    BiFPN          several times both paths, with learned weights (EfficientDet, Tan et al. 2020, section 3)
    SimplePyramid  all levels of the one map of a plain ViT, each by itself (ViTDet, Li et al. 2022, section 3)
    SingleLevel    no pyramid: one map, as in Faster R-CNN before FPN ("C4" and dilated "DC5" models)

Dimensions: N images, L levels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.ops.layers import conv_block, conv_layout, init_uniform, module_list, norm_layer


def check_top(top: str, *ways: str) -> None:
    """ValueError unless `top` is one of the ways to make one more level, or 'none'."""
    if top not in (*ways, "none"):
        raise ValueError(f"top={top!r}: expected {', '.join(map(repr, ways))} or 'none'")


def enlarged(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps [N, C, H, W] at `size`, each value that of the nearest cell, in x's type: autocast would make float32 maps,
    of which nothing is more exact."""
    if x.dtype == torch.float32:
        return F.interpolate(x, size=size, mode="nearest")
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, size=size, mode="nearest")


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
        check_top(top, "max_pool", "conv")
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
            merged[i - 1] = merged[i - 1] + enlarged(merged[i], merged[i - 1].shape[-2:])
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


class Fusion(nn.Module):
    """conv(SiLU(sum_i w_i x_i / (eps + sum_i w_i))) of equally large maps, w_i >= 0 learned: "fast normalized fusion",
    and a depthwise separable convolution with a norm."""

    def __init__(self, inputs: int, channels: int, norm: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = norm_layer(norm)(channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[N, C, H, W] of maps [N, C, H, W], one per input."""
        weight = F.relu(self.weight)
        weight = weight / (weight.sum() + 1e-4)
        mixed = sum(w * x for w, x in zip(weight, maps))
        return self.norm(self.pointwise(self.depthwise(F.silu(mixed))))


class BothWays(nn.Module):
    """One layer of BiFPN on levels P, finest first; the coarsest and the finest have no node of their own between:

    t_i = fuse(p_i, enlarged t_{i+1})          n_i = fuse(p_i, t_i, pooled n_{i-1}),  the last one without t
    """

    def __init__(self, levels: int, channels: int, norm: str):
        super().__init__()
        self.down = module_list(Fusion(2, channels, norm) for _ in range(levels - 1))
        self.up = module_list(Fusion(3 if i < levels - 2 else 2, channels, norm) for i in range(levels - 1))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Levels [N, C, Hl, Wl] of levels of these sizes."""
        between = list(levels)
        for i in range(len(levels) - 2, -1, -1):
            larger = enlarged(between[i + 1], levels[i].shape[-2:])
            between[i] = self.down[i]([levels[i], larger])
        found = between[:1]
        for i, fuse in enumerate(self.up, 1):
            both = [levels[i], between[i]] if i < len(levels) - 1 else [levels[i]]
            found.append(fuse([*both, pooled(found[-1])]))
        return found


def pooled(level: Tensor) -> Tensor:
    """The next coarser level: maxima of 3 x 3 cells at stride 2."""
    return F.max_pool2d(level, 3, stride=2, padding=1)


class BiFPN(nn.Module):
    """1 x 1 convolutions to C channels, and `repeats` times both paths over all levels.

    Args:
        in_channels, strides: of the backbone's maps, finest first; each stride twice the one before.
        out_channels: C of every level.
        norm: norm by name after each convolution. Without one the repeated sums diverge.
        repeats: how often. EfficientDet-D0 to D7 have 3 to 8.
        top: 'max_pool' takes one more level into the pyramid, for the RPN's largest anchors; 'none' adds nothing.

    Attributes: as FPN's.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int = 256,
        norm: str = "batch_norm",
        repeats: int = 3,
        top: str = "max_pool",
    ):
        super().__init__()
        check_top(top, "max_pool")
        if repeats < 1:
            raise ValueError(f"repeats={repeats}: expected at least 1")
        if norm is None:
            raise ValueError("norm=None: BiFPN needs one, such as 'batch_norm' or 'group_norm'")
        self.strides = list(strides) if top == "none" else [*strides, 2 * strides[-1]]
        if len(self.strides) < 2:
            raise ValueError(f"strides={list(strides)}, top={top!r}: a pyramid has at least two levels")
        self.lateral = nn.ModuleList(conv_block(c, out_channels, 1, norm, relu=False) for c in in_channels)
        self.layers = nn.Sequential(*(BothWays(len(self.strides), out_channels, norm) for _ in range(repeats)))
        self.top, self.out_channels, self.roi_levels = top, out_channels, len(strides)
        init_uniform(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [N, C, Hl, Wl], finest first, of the backbone's maps."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps)]
        if self.top == "max_pool":
            levels.append(pooled(levels[-1]))
        return self.layers(levels)


class SimplePyramid(nn.Module):
    """Levels of one map: enlarged by deconvolutions, as it is, and halved by max pooling; of each a 1 x 1 and a 3 x 3
    convolution with a norm, without a ReLU.

    Args:
        in_channels, strides: of the backbone's one map.
        out_channels: C of every level.
        norm: norm by name after the convolutions, and between the two deconvolutions.
        levels: strides of the levels, finest first: a quarter of the map's, half of it, its own, twice it, or some of
            these.
        top: 'max_pool' takes every second cell of the last level for one more, for the RPN's largest anchors; 'none'
            adds nothing.

    Attributes: as FPN's.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        out_channels: int = 256,
        norm: str = "layer_norm",
        levels: Sequence[int] = (4, 8, 16, 32),
        top: str = "max_pool",
    ):
        super().__init__()
        check_top(top, "max_pool")
        if len(strides) != 1:
            raise ValueError(
                f"strides={list(strides)}: a simple pyramid is made of one map, such as backbone@model.backbone=vit's; "
                "for several take neck@model.neck=fpn"
            )
        wide, has = in_channels[0], strides[0]
        if not levels or [*levels] != [s for s in (has // 4, has // 2, has, 2 * has) if s in levels]:
            raise ValueError(f"levels={list(levels)}: of {has // 4}, {has // 2}, {has}, {2 * has}, finest first, some")
        self.scale, channels = nn.ModuleList(), []
        for stride in levels:
            layers, last = rescaled(wide, 4 * has // stride, norm)
            self.scale.append(layers)
            channels.append(last)
        self.lateral = nn.ModuleList(conv_block(c, out_channels, 1, norm, relu=False) for c in channels)
        self.output = nn.ModuleList(conv_block(out_channels, out_channels, 3, norm, relu=False) for _ in channels)
        self.top, self.out_channels, self.roi_levels = top, out_channels, len(levels)
        self.strides = list(levels) if top == "none" else [*levels, 2 * levels[-1]]
        init_uniform(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Levels [N, C, Hl, Wl], finest first, of the backbone's map."""
        (x,) = maps
        levels = [
            output(conv_layout(lateral(scale(x))))
            for scale, lateral, output in zip(self.scale, self.lateral, self.output)
        ]
        return levels if self.top == "none" else [*levels, levels[-1][:, :, ::2, ::2]]


def rescaled(channels: int, quarters: int, norm: str) -> tuple[nn.Sequential, int]:
    """Layers that make a map of `quarters` / 4 times the sides, and how many channels it has."""
    if quarters <= 4:
        return nn.Sequential(*[nn.MaxPool2d(2)] * (quarters == 2)), channels
    layers: list[nn.Module] = [nn.ConvTranspose2d(channels, channels // 2, 2, stride=2)]
    if quarters == 16:
        layers += [norm_layer(norm)(channels // 2), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels // 2, channels // 4, 2, stride=2))
    return nn.Sequential(*layers), 4 * channels // quarters


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
