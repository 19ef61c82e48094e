"""RoI features with their surroundings.

    out = x + U x' + V m

with x the pooled RoI, x' the same method on the RoI enlarged about its centre ('A MultiPath network for object
detection', Zagoruyko et al. 2016, section 3.2: foveal regions), and m the mean of the image's map ('ParseNet', Liu et
al. 2015, section 3.1: global context): as there a layer on all of them side by side, which keeps x as it is.
Dimensions: N images, R RoIs, C channels, h x w bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detector.ops.checks import require
from detector.ops.layers import init_zero
from detector.roi.base import RoIOp, check_inputs
from detector.roi.wrapped import WrappedRoIOp
from detector.structures import RoIFeatures


class ContextRoIPool(WrappedRoIOp):
    """The RoI, the enlarged RoI, and the image's mean.

    Args:
        output_size: int or (h, w). channels: C of the features.
        scale: of the enlarged RoI's width and height, 2 by default.
        op: factory of the method that pools both, RoIAlign with its defaults if None. It must not return offsets.

    U and V start at zero, and the method as `op`. All three are read from the RoI's own level. In training the mean is
    that of the padded map.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        scale: float = 2.0,
        op: Callable[..., RoIOp] | None = None,
    ):
        super().__init__(output_size, channels, op)
        require(scale > 1, "scale", scale, "above 1")
        self.scale = scale
        pooled = self.output_channels(channels)
        self.around = nn.Conv2d(pooled, pooled, 1, bias=False)
        self.image = nn.Linear(channels, pooled, bias=False)
        init_zero(self.around)
        init_zero(self.image)

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        own, around = (
            self.op(features, boxes, levels, strides).features for boxes in (rois, enlarged(rois, self.scale))
        )
        means = torch.stack([f.mean(dim=(2, 3)) for f in features])  # [L, N, C]
        image = rois[:, 0].detach().nan_to_num(0).clamp(0, max(means.shape[1] - 1, 0)).long()
        mean = means[levels.clamp(0, len(features) - 1), image]
        return RoIFeatures(own + self.around(around) + self.image(mean)[..., None, None])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}"


def enlarged(rois: Tensor, scale: float) -> Tensor:
    """RoIs [R, 5] with the same centres, `scale` times as wide and high, in float32 or better."""
    rois = rois.to(torch.promote_types(rois.dtype, torch.float32))
    more = (rois[:, 3:] - rois[:, 1:3]) * ((scale - 1) / 2)
    return torch.cat([rois[:, :1], rois[:, 1:3] - more, rois[:, 3:] + more], 1)
