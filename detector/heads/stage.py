"""Stage 5 of a ResNet on RoIs: the head of the first Faster R-CNNs with ResNets, "C4" (He et al. 2016 and 2017).

Dimensions: R RoIs, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, conv1x1

from detector.layers import norm_layer


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
        planes, self.out_channels, norm = in_channels // 2, 2 * in_channels, norm_layer(norm)
        shortcut = nn.Sequential(conv1x1(in_channels, self.out_channels, stride=2), norm(self.out_channels))
        width = {"groups": groups, "base_width": width_per_group, "norm_layer": norm}
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

    def __init__(self, in_channels: int, output_size: tuple[int, int], trunk: ResNetTrunk):
        super().__init__()
        self.__dict__["trunk"] = trunk  # past nn.Module's registry
        self.out_channels = trunk.out_channels

    def forward(self, features: Tensor) -> Tensor:
        """[R, 2 C, h / 2, w / 2] of RoI features [R, C, h, w]."""
        return self.trunk.layer4(features)
