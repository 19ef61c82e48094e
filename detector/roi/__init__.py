"""RoI methods: one file each, all behind `RoIOp`, and the extractor that binds one to a feature pyramid."""

from detector.roi.adaptive_pooling import AdaptivePooling
from detector.roi.aggregate import GRoIE, SumLevels
from detector.roi.align import RoIAlign
from detector.roi.attention import DeformableAttentionPool
from detector.roi.bag import max_bag, weighted_bag
from detector.roi.base import RoIOp, make_op
from detector.roi.border import BorderAlign
from detector.roi.context import ContextRoIPool
from detector.roi.deformable import DeformableRoIPool
from detector.roi.extractor import LEVEL_RULES, RoIExtractor, assign_levels
from detector.roi.light_head import LightHeadRoIAlign
from detector.roi.pool import RoIPool
from detector.roi.position_sensitive import (
    DeformablePositionSensitiveRoIPool,
    PositionSensitiveRoIAlign,
    PositionSensitiveRoIPool,
)
from detector.roi.precise import PreciseRoIPool
from detector.roi.rotated import RotatedRoIAlign
from detector.roi.semantic import SemanticRoIAlign
from detector.roi.soft_levels import SoftLevels
from detector.roi.warp import RoIWarp
from detector.structures import RoIFeatures

__all__ = [
    "LEVEL_RULES",
    "AdaptivePooling",
    "BorderAlign",
    "ContextRoIPool",
    "DeformableAttentionPool",
    "DeformablePositionSensitiveRoIPool",
    "DeformableRoIPool",
    "GRoIE",
    "LightHeadRoIAlign",
    "PositionSensitiveRoIAlign",
    "PositionSensitiveRoIPool",
    "PreciseRoIPool",
    "RoIAlign",
    "RoIExtractor",
    "RoIFeatures",
    "RoIOp",
    "RoIPool",
    "RoIWarp",
    "RotatedRoIAlign",
    "SemanticRoIAlign",
    "SoftLevels",
    "SumLevels",
    "assign_levels",
    "make_op",
    "max_bag",
    "weighted_bag",
]
