"""Building blocks that more than one part of the model uses."""

from __future__ import annotations

from functools import partial

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

NORMS = {
    "frozen_batch_norm": FrozenBatchNorm2d,
    "batch_norm": nn.BatchNorm2d,
    "sync_batch_norm": nn.SyncBatchNorm,
    "group_norm": partial(nn.GroupNorm, 32),
}


def norm_layer(name: str):
    """The factory `norm(channels)` of that name; ValueError for a name that is not in NORMS."""
    if name not in NORMS:
        raise ValueError(f"norm={name!r}: expected one of {', '.join(NORMS)}")
    return NORMS[name]


def conv_block(
    in_channels: int, out_channels: int, kernel: int, norm: str | None = None, relu: bool = True, stride: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size (at stride 1), a norm by name, which then replaces the bias, and ReLU."""
    padding = kernel // 2
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=norm is None)]
    if norm is not None:
        layers.append(norm_layer(norm)(out_channels))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def init_normal(module: nn.Module, std: float) -> None:
    """Normal weights with that standard deviation and zero biases in every convolution and linear layer."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def init_kaiming(module: nn.Module) -> None:
    """He et al. 2015, fan-out for ReLU, and zero biases in every convolution."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
