from detector.heads.box import BoxHead
from detector.heads.mask import MaskHead
from detector.heads.trunk import ConvTrunk, FCTrunk
