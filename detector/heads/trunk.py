"""What lies between the RoI features and the predictions of a head.

Dimensions: R RoIs, C channels. Every trunk has `out_channels`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.layers import conv_block, init_kaiming


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
        for layer in self.fc:
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
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

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Take the weight [out_features, in_channels h w] of a plain linear layer, too."""
        weight = state_dict.get(f"{prefix}weight")
        if weight is not None and weight.shape == self.weight.flatten(1).shape:
            state_dict[f"{prefix}weight"] = weight.reshape(self.weight.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, features: Tensor) -> Tensor:
        if features.is_contiguous():
            return F.linear(features.flatten(1), self.weight.flatten(1), self.bias)
        # as a convolution it is fastest on a CPU, but the gradient takes more memory
        if features.device.type == "cpu" and not torch.is_grad_enabled():
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
