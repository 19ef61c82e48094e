from detector.backbone.fpn import FPN
from detector.backbone.resnet import ResNet
