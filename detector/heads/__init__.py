from detector.heads.attributes import AttributeHead
from detector.heads.box import BoxHead
from detector.heads.cascade import CascadeBoxHead, CascadeMaskHead
from detector.heads.double import DoubleBoxHead, ResidualTrunk
from detector.heads.dynamic import DynamicBoxHead
from detector.heads.hybrid import HybridMaskHead
from detector.heads.keypoint import KeypointHead
from detector.heads.mask import MaskHead
from detector.heads.mask_scoring import MaskScoringHead
from detector.heads.point_rend import PointRendHead
from detector.heads.trunk import ConvTrunk, FCTrunk, ResNetTrunk
