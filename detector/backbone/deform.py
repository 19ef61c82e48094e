"""Deformable convolution (Dai et al. 2017; modulated, "v2": Zhu et al. 2019) in the stages of a ResNet.

    y(p) = sum over the kernel's points k of w_k x(p + p_k + offset_k(p)) m_k(p)

Offsets and, in v2, the modulation m in (0, 1) come from a convolution on the same input; in v1 m is 1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformConv2d(nn.Conv2d):
    """A convolution whose points move; it starts as the plain one (v2: as half of it).

    Args:
        plain: the convolution that it takes the place of, without a bias.
        modulated: v2 instead of v1.
        offset_groups: groups of input channels with offsets of their own.
    """

    def __init__(self, plain: nn.Conv2d, modulated: bool = False, offset_groups: int = 1):
        settings = {
            "stride": plain.stride,
            "padding": plain.padding,
            "dilation": plain.dilation,
        }
        super().__init__(
            plain.in_channels, plain.out_channels, plain.kernel_size, groups=plain.groups, bias=False, **settings
        )
        self.weight = plain.weight
        if offset_groups < 1 or plain.in_channels % offset_groups:
            raise ValueError(f"offset_groups={offset_groups}: expected a divisor of the {plain.in_channels} channels")
        points = offset_groups * plain.kernel_size[0] * plain.kernel_size[1]
        self.offset = nn.Conv2d(plain.in_channels, (3 if modulated else 2) * points, plain.kernel_size, **settings)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)
        self.modulated = modulated

    def forward(self, x: Tensor) -> Tensor:
        """[N, out_channels, H', W'] of x [N, in_channels, H, W]."""
        offset, mask = self.offset(x), None
        if self.modulated:
            points = offset.shape[1] // 3
            offset, mask = offset.split([2 * points, points], dim=1)
            mask = mask.sigmoid()
        weight = self.weight.to(x.dtype)  # autocast knows nothing of this op
        return deform_conv2d(x, offset.to(x.dtype), weight, None, self.stride, self.padding, self.dilation, mask)
