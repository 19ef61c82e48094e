"""Stage 5 as a head: its arithmetic, and that boxes and masks share one copy of it."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torchvision.models import resnet50

from detector.backbone import ResNet, SingleLevel
from detector.heads import BoxHead, CascadeBoxHead, MaskHead, ResNetTrunk
from detector.model import TwoStageDetector
from detector.roi import RoIAlign
from detector.rpn import RPN
from tests.tiny import random_batch


def test_it_is_stage_5_and_a_mean():
    theirs = resnet50().eval()
    trunk = ResNetTrunk(1024, (14, 14)).eval()
    trunk.layer4.load_state_dict(theirs.layer4.state_dict())
    x = torch.randn(2, 1024, 14, 14)
    with torch.no_grad():
        torch.testing.assert_close(trunk(x), theirs.layer4(x).mean(dim=(2, 3)), atol=1e-4, rtol=1e-4)
        caffe = ResNetTrunk(1024, (14, 14), stride_in_1x1=True).eval()
        assert caffe.layer4[0].conv1.stride == (2, 2) and caffe.layer4[0].conv2.stride == (1, 1)
        assert caffe(x).shape == (2, 2048)


def c4_mask_model() -> TwoStageDetector:
    torch.manual_seed(0)
    return TwoStageDetector(
        3,
        ResNet(50, width=8, stages=[4], norm="batch_norm", frozen_stages=0),
        SingleLevel,
        partial(RPN, anchor_sizes=[[16, 32]]),
        partial(BoxHead, roi=RoIAlign, output_size=14, trunk=partial(ResNetTrunk, norm="batch_norm")),
        partial(MaskHead, roi=RoIAlign, upsample_channels=8),
        share_trunk=True,
    )


def test_boxes_and_masks_share_it():
    model = c4_mask_model()
    assert not any(key.startswith("mask_head.trunk") for key in model.state_dict())
    batch, targets = random_batch()
    losses = model.train()(batch, targets)
    losses["loss_mask"].backward()
    assert model.box_head.trunk.layer4[0].conv1.weight.grad.abs().sum() > 0
    # a copy, as the moving average of the weights is one, shares its own
    twin = copy.deepcopy(model)
    assert twin.mask_head.trunk.trunk is twin.box_head.trunk
    model.eval()
    model.box_head.score_threshold = 0.0
    with torch.no_grad():
        assert model(batch).masks.shape[2:] == (14, 14)


@pytest.mark.parametrize("box_head", [BoxHead, CascadeBoxHead])
def test_a_trunk_of_another_kind_is_not_shared(box_head):
    parts = (
        ResNet(10, width=8, stages=[4]),
        SingleLevel,
        partial(RPN, anchor_sizes=[[16]]),
        partial(box_head, roi=RoIAlign),
    )
    build = partial(TwoStageDetector, 3, *parts)
    with pytest.raises(ValueError, match="ResNetTrunk; set share_trunk=false"):
        build(mask_head=partial(MaskHead, roi=RoIAlign), share_trunk=True)
    build(mask_head=partial(MaskHead, roi=RoIAlign), share_trunk=False)
    build(share_trunk=True)  # there is nothing that could share it


def test_padding_is_cut_where_the_model_was_trained_without():
    model = c4_mask_model().eval()
    model.size_divisibility = 1
    batch, _ = random_batch(size=(90, 118))
    more = batch._replace(images=torch.nn.functional.pad(batch.images, (0, 10, 0, 38)))
    with torch.no_grad():
        for alone, padded in zip(model(batch), model(more)):
            if alone is not None:
                torch.testing.assert_close(alone, padded)
