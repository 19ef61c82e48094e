"""`model.weights=FILE` on the command line: settings come along, what the user set stays, misfits end the program."""

from __future__ import annotations

import torch
from hydra import compose, initialize_config_dir
from torchvision.models import resnet50
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from detector.config import CONFIGS, build, check
from detector.weights import Start


def composed(*overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["experiment=none", "model=faster_rcnn", *overrides])
    check(cfg)
    return cfg


def test_settings_come_along_but_for_those_that_were_chosen(tmp_path):
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    file = f"model.weights={tmp_path / 'weights.pth'}"
    cfg = composed(file, "+model.rpn.min_size=2.0", "+model.box_head.min_size=1.0")
    start = build(cfg.weights, "weights")
    weights = start.read(cfg, chosen={"model.rpn.min_size", "model.weights"})
    assert cfg.model.weights is None
    assert cfg.model.rpn.anchor_rounding is True and cfg.model.box_head.roi.aligned is False
    assert cfg.model.rpn.min_size == 2.0 and cfg.model.box_head.min_size == 0.01
    check(cfg)
    model = build(cfg.model, "model", num_classes=3)
    start.load(model, weights)
    assert torch.equal(model.neck.lateral[0][0].weight, theirs.backbone.fpn.inner_blocks[0][0].weight)
    # another RoI method keeps its own settings
    cfg = composed(file, "roi=pool")
    Start().read(cfg)
    assert "aligned" not in cfg.model.box_head.roi


def test_a_backbone_of_caffe_changes_how_images_are_normalised(tmp_path):
    torch.save(resnet50().state_dict(), tmp_path / "resnet50_msra.pth")
    cfg = composed(f"model.weights={tmp_path / 'resnet50_msra.pth'}")
    weights = Start(source="mmdet").read(cfg)
    assert cfg.model.channel_order == "bgr" and list(cfg.model.pixel_std) == [1, 1, 1]
    assert cfg.model.backbone.stride_in_1x1 is True
    assert all(key.startswith("backbone.") for key in weights.state_dict)


def test_without_a_file_nothing_changes():
    cfg = composed()
    before = cfg.copy()
    assert Start().read(cfg) is None
    assert cfg == before
