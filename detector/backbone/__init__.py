from detector.backbone.necks import FPN, PAFPN, BiFPN, SimplePyramid, SingleLevel
from detector.backbone.resnet import ResNet
from detector.backbone.swin import Swin
from detector.backbone.timm import TimmBackbone
from detector.backbone.vit import ViT
