"""What lies between the RoI features and the predictions of a head.

Dimensions: R RoIs, C channels. Every trunk has `out_channels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, conv1x1

from detector.ops.layers import (
    conv_block,
    finishes_in_one_pass,
    init_kaiming,
    init_uniform,
    joined,
    norm_layer,
    prefers_channels_last,
)


class FCTrunk(nn.Module):
    """Convolutions (FPN's box head has none, the "4conv1fc" head four), then fully connected layers.

    Args:
        in_channels, output_size: of the RoI features [R, C, h, w].
        conv_channels: widths of 3 x 3 convolutions.
        fc_channels: widths of the fully connected layers.
        norm: norm by name after each convolution, or None.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: tuple[int, int],
        conv_channels: Sequence[int] = (),
        fc_channels: Sequence[int] = (1024, 1024),
        norm: str | None = None,
    ):
        super().__init__()
        channels = [in_channels, *conv_channels]
        self.conv = nn.Sequential(*(conv_block(a, b, 3, norm) for a, b in zip(channels, channels[1:])))
        init_kaiming(self.conv)
        first = [RoILinear(channels[-1], output_size, width) for width in fc_channels[:1]]
        self.fc = nn.ModuleList([*first, *(nn.Linear(a, b) for a, b in zip(fc_channels, fc_channels[1:]))])
        init_uniform(self.fc)
        self.out_channels = fc_channels[-1] if fc_channels else channels[-1] * output_size[0] * output_size[1]

    def forward(self, features: Tensor) -> Tensor:
        """[R, out_channels] of RoI features [R, C, h, w]."""
        hidden = self.conv(features)
        for layer in self.fc:
            hidden = layer(hidden).relu_()
        return hidden.flatten(1)


class RoILinear(nn.Conv2d):
    """A fully connected layer on RoI features [R, in_channels, *output_size]: [R, out_features].

    With its weight as [out_features, in_channels, *output_size] both stay in the layout that they have in memory, where
    flattening would rearrange channels_last features.
    """

    def __init__(self, in_channels: int, output_size: tuple[int, int], out_features: int):
        super().__init__(in_channels, out_features, output_size)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the weight [out_features, in_channels h w] of a plain linear layer, too."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.shape == self.weight.flatten(1).shape:
            state_dict[f"{prefix}weight"] = weight.reshape(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, features: Tensor) -> Tensor:
        if features.is_contiguous():
            return F.linear(features.flatten(1), self.weight.flatten(1), self.bias)
        # as a convolution it is fastest on a CPU with AVX-512, where the gradient takes more memory; on others slowest
        on_cpu = features.device.type == "cpu" and prefers_channels_last(features.device)
        if on_cpu and not torch.is_grad_enabled():
            if finishes_in_one_pass(features) and self.bias is not None:
                return joined(features, self.weight, None, self.bias, self).flatten(1)
            return super().forward(features).flatten(1)
        features, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (features, self.weight))
        return F.linear(features, weight, self.bias)


class ConvTrunk(nn.Module):
    """3 x 3 convolutions that keep the RoI's resolution (Mask R-CNN, He et al. 2017, figure 4).

    Args:
        in_channels, output_size: of the RoI features [R, C, h, w].
        conv_channels: widths of the convolutions.
        norm: norm by name after each convolution, or None.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: tuple[int, int],
        conv_channels: Sequence[int] = (256, 256, 256, 256),
        norm: str | None = None,
    ):
        super().__init__()
        channels = [in_channels, *conv_channels]
        self.conv = nn.Sequential(*(conv_block(a, b, 3, norm) for a, b in zip(channels, channels[1:])))
        init_kaiming(self.conv)
        self.out_channels = channels[-1]

    def forward(self, features: Tensor) -> Tensor:
        """[R, out_channels, h, w] of RoI features [R, C, h, w]."""
        return self.conv(features)


class ResNetTrunk(nn.Module):
    """The bottlenecks of stage 5, at stride 2, then the mean over the RoI's cells.

    Args:
        in_channels, output_size: of the RoI features [R, C, h, w]: stage 4's.
        blocks, norm, groups, width_per_group, stride_in_1x1: as in the backbone, see backbone.ResNet.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: tuple[int, int],
        blocks: int = 3,
        norm: str = "frozen_batch_norm",
        groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
    ):
        super().__init__()
        planes, self.out_channels = in_channels // 2, 2 * in_channels
        width: dict[str, Any] = {"groups": groups, "base_width": width_per_group, "norm_layer": norm_layer(norm)}
        shortcut = nn.Sequential(conv1x1(in_channels, self.out_channels, stride=2), norm_layer(norm)(self.out_channels))
        first = Bottleneck(in_channels, planes, stride=2, downsample=shortcut, **width)
        if stride_in_1x1:
            first.conv1.stride, first.conv2.stride = first.conv2.stride, first.conv1.stride
        self.layer4 = nn.Sequential(first, *(Bottleneck(self.out_channels, planes, **width) for _ in range(blocks - 1)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor) -> Tensor:
        """[R, 2 C] of RoI features [R, C, h, w]."""
        return self.layer4(features).mean(dim=(2, 3))


class SharedTrunk(nn.Module):
    """The box head's ResNetTrunk, before the mean, for the mask head: used, not owned, so its weights count once."""

    trunk: ResNetTrunk

    def __init__(self, in_channels: int, output_size: tuple[int, int], head: object):
        super().__init__()
        trunk: Any = getattr(head, "trunk", None)
        if not hasattr(trunk, "layer4"):
            raise ValueError("share_trunk=true: needs a box_head with a ResNetTrunk; set share_trunk=false without one")
        self.__dict__["trunk"] = trunk  # past nn.Module's registry
        self.out_channels = trunk.out_channels

    def forward(self, features: Tensor) -> Tensor:
        """[R, 2 C, h / 2, w / 2] of RoI features [R, C, h, w]."""
        return self.trunk.layer4(features)
