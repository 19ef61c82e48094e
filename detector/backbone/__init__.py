from detector.backbone.fpn import FPN
from detector.backbone.pafpn import PAFPN
from detector.backbone.resnet import ResNet
from detector.backbone.single import SingleLevel
from detector.backbone.timm import TimmBackbone
