"""A RoI method bound to a feature pyramid: assign each RoI its level, then pool."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from detector.roi.base import RoIOp, check_choice
from detector.roi.levels import LEVEL_RULES, assign_levels
from detector.structures import RoIFeatures


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
        """Pool `rois` [R, 5] = (batch_index, x1, y1, x2, y2) in image pixels from one map [N, C, Hl, Wl] per stride."""
        if len(features) != len(self.strides):
            raise ValueError(f"features must hold one map per stride {self.strides}, got {len(features)}")
        if rois.ndim != 2 or rois.shape[1] != 5:
            raise ValueError(f"rois must have shape [R, 5] = (batch_index, x1, y1, x2, y2), got {list(rois.shape)}")
        levels = assign_levels(rois[:, 1:], self.strides, self.canonical_level, self.canonical_size, self.level_rule)
        return self.op(features, rois, levels, self.strides)

    def extra_repr(self) -> str:
        return f"strides={self.strides}, level_rule={self.level_rule!r}"
