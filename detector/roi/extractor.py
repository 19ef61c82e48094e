"""A RoI method bound to a feature pyramid: assign each RoI its level, then pool.

The level is equation 1 of 'Feature Pyramid Networks' (Lin et al. 2017):

    k = floor(k0 + log2(sqrt(w h) / 224)), clamped to the levels there are.

Every framework guards the logarithm in its own way. A RoI whose size lies on a boundary (112, 224, 448 pixels) can
change its level with the rule, so imported weights should run with the rule of the framework that trained them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2

import torch
from torch import Tensor, nn

from detector.ops.checks import check_choice
from detector.roi.base import RoIOp, check_rois
from detector.structures import RoIFeatures

LEVEL_RULES = ("detectron2", "torchvision", "mmdetection")


def assign_levels(
    boxes: Tensor,
    strides: Sequence[float],
    canonical_level: float = 4,
    canonical_size: float = 224,
    rule: str = "detectron2",
) -> Tensor:
    """Index into `strides` of the level that each box reads.

    With s = sqrt(area), k0 = canonical_level, s0 = canonical_size and k_min = log2(strides[0]):
      detectron2:   floor(k0 + log2(s / s0 + 1e-8)) - k_min
      torchvision:  floor(k0 + log2(s / s0) + 1e-6) - k_min
      mmdetection:  floor(log2(s / finest + 1e-6)), finest = s0 / 2^(k0 - k_min): 56 px in the usual pyramid
    each clamped to [0, len(strides) - 1]. A box without a size (NaN, reversed on one axis) reads the finest level.

    Args:
        boxes: [R, 4] in image pixels. strides: of the levels, each twice the one before.
    Returns: [R] int64.
    Raises: ValueError for an unknown rule, boxes of another shape, or strides that do not double.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape [R, 4], got {list(boxes.shape)}")
    if not strides or strides[0] <= 0 or any(b != 2 * a for a, b in zip(strides, strides[1:])):
        raise ValueError(f"strides must be positive and double from level to level, got {list(strides)}")
    boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
    size = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    finest = log2(strides[0])
    if rule == "detectron2":
        level = (canonical_level + (size / canonical_size + 1e-8).log2()).floor() - finest
    elif rule == "torchvision":
        level = (canonical_level + (size / canonical_size).log2() + 1e-6).floor() - finest
    elif rule == "mmdetection":
        level = (size / (canonical_size / 2 ** (canonical_level - finest)) + 1e-6).log2().floor()
    else:
        raise ValueError(f"level rule must be one of {', '.join(LEVEL_RULES)}, got {rule!r}")
    return level.nan_to_num(0, posinf=len(strides)).clamp(0, len(strides) - 1).long()


class RoIExtractor(nn.Module):
    """features, rois -> RoIFeatures.

    Args:
        op: the RoI method. strides: of the levels that will be fed, in image pixels.
        level_rule, canonical_level, canonical_size: see `assign_levels`.
    """

    def __init__(
        self,
        op: RoIOp,
        strides: Sequence[float],
        level_rule: str = "detectron2",
        canonical_level: float = 4,
        canonical_size: float = 224,
    ):
        super().__init__()
        check_choice("level_rule", level_rule, LEVEL_RULES)
        self.op = op
        self.strides = tuple(strides)
        self.level_rule = level_rule
        self.canonical_level = canonical_level
        self.canonical_size = canonical_size

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> RoIFeatures:
        """Pool `rois` [R, 5] = (batch_index, x1, y1, x2, y2) in image pixels from one map [N, C, Hl, Wl] per stride.

        Methods that take angles pool [R, 6] = (batch_index, cx, cy, width, height, angle) too; their level is that of
        their width and height.
        """
        if len(features) != len(self.strides):
            raise ValueError(f"features must hold one map per stride {self.strides}, got {len(features)}")
        check_rois(rois, self.op.takes_angles)
        upright = rois[:, 1:] if rois.shape[1] == 5 else torch.cat([torch.zeros_like(rois[:, 3:5]), rois[:, 3:5]], 1)
        levels = assign_levels(upright, self.strides, self.canonical_level, self.canonical_size, self.level_rule)
        return self.op(features, rois, levels, self.strides)

    def extra_repr(self) -> str:
        return f"strides={self.strides}, level_rule={self.level_rule!r}"
