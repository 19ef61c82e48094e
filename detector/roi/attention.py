"""Multi-scale deformable attention ('Deformable DETR', Zhu et al. 2021, equation 3), with the bins of a RoI as queries.

    out_q = z_q + W sum over heads m, levels l, points k of A_mlqk W'_m f_l(p_q + 0.5 / K * offset_mlqk * (w_q, h_q))

z_q is what a RoI method pools in bin q, p_q the bin's centre, w_q and h_q its sides: the bin stands for the reference
box of the paper's two-stage form (appendix A.4). The offsets and, by a softmax over levels and points, the weights A
are linear in z_q. Dimensions: L levels, R RoIs, C channels, M heads, K points per head and level, h x w bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi

import torch
from torch import Tensor, nn

from detector.ops.checks import check_counts, require
from detector.ops.layers import init_zero
from detector.roi.adaptive_pooling import check_levels
from detector.roi.base import RoIOp, check_inputs
from detector.roi.geometry import Regions, at_points, locate
from detector.roi.position_sensitive import pool_groups
from detector.roi.wrapped import WrappedRoIOp
from detector.structures import RoIFeatures


class DeformableAttentionPool(WrappedRoIOp):
    """A pooled RoI whose bins look at all levels, at points that they choose.

    Args:
        output_size: int or (h, w). channels: C of the features, a multiple of `heads`. levels: L.
        heads, points: M and K.
        op: factory of the method that makes the queries, from the RoI's own level; RoIAlign with its defaults if None.
            It must not return offsets, and must keep C.

    Head m has the channels m, m + M, ... of W'. Offsets start as in the paper: head m in the direction 2 pi m / M, its
    point k at k + 1 steps. W starts at zero, and the method as `op`. Gradients reach features and boxes.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        levels: int = 4,
        heads: int = 8,
        points: int = 4,
        op: Callable[..., RoIOp] | None = None,
    ):
        super().__init__(output_size, channels, op, levels)
        check_counts(heads=heads, points=points)
        require(channels % heads == 0, "channels", channels, f"a multiple of heads = {heads}")
        self.shape = heads, levels, points
        self.value = nn.Conv2d(channels, channels, 1)
        self.offsets = nn.Linear(channels, 2 * heads * levels * points)
        self.weights = nn.Linear(channels, heads * levels * points)
        self.project = nn.Linear(channels, channels)
        for layer in (self.value, self.offsets, self.weights, self.project):
            init_zero(layer)
        nn.init.xavier_uniform_(self.value.weight)
        angles = torch.arange(heads) * (2 * pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], 1)
        directions = directions / directions.abs().amax(1, keepdim=True)  # onto a square
        steps = torch.arange(1, points + 1)
        start = (directions[:, None, None] * steps[:, None]).expand(heads, levels, points, 2)
        self.offsets.bias.data.copy_(start.reshape(-1))

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        check_levels(features, self.shape[1])
        own = self.op(features, rois, levels, strides).features
        queries = own.flatten(2).mT  # [R, h * w, C]
        offsets = self.offsets(queries).unflatten(2, (*self.shape, 2))
        weights = self.weights(queries).unflatten(2, (self.shape[0], -1)).softmax(3).unflatten(3, self.shape[1:])
        group = torch.arange(self.shape[0], dtype=torch.int32, device=rois.device)[None, None]
        parts = []
        for level, (feature, stride) in enumerate(zip(features, strides)):
            value = [self.value(feature)]
            regions = locate(value, rois, torch.zeros_like(levels), [stride])
            x, y = self.locations(regions, offsets[:, :, :, level])
            axes = at_points(x, y, regions, weights[:, :, :, level])
            parts.append(pool_groups(value, regions, *axes, group, self.shape[0]))  # [R, C / M, h * w, M]
        mixed = self.project(sum(parts[1:], parts[0]).transpose(1, 2).flatten(2))  # [R, h * w, C]
        return RoIFeatures(own + mixed.mT.unflatten(2, self.output_size))

    def locations(self, regions: Regions, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """x and y [R, h * w, M, K] in cells of one level, for offsets [R, h * w, M, K, 2]."""
        h, w = self.output_size
        x1, y1, x2, y2 = regions.boxes[:, :, None].unbind(1)  # [R, 1]
        width, height = (x2 - x1) / w, (y2 - y1) / h
        bins = torch.arange(h * w, device=x1.device)
        x, y = x1 + (bins % w + 0.5) * width - 0.5, y1 + (bins // w + 0.5) * height - 0.5  # [R, h * w]
        steps = offsets.to(x.dtype) * (0.5 / self.shape[2])
        x = x[..., None, None] + steps[..., 0] * width[..., None, None]
        return x, y[..., None, None] + steps[..., 1] * height[..., None, None]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.shape[0]}, points={self.shape[2]}"
