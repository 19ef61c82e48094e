from detector.backbone.necks import FPN, PAFPN, BiFPN, SingleLevel
from detector.backbone.resnet import ResNet
from detector.backbone.timm import TimmBackbone
