"""Deformable convolutions against the plain ones that they start from, and where their points go."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from detector.backbone import ResNet
from detector.backbone.resnet import DeformConv2d


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 4), (1, 2, 1)])
def test_starts_as_the_plain_convolution(stride, dilation, groups):
    plain = nn.Conv2d(8, 12, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)
    x = torch.randn(2, 8, 9, 11)
    torch.testing.assert_close(DeformConv2d(plain)(x), plain(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(DeformConv2d(plain, modulated=True)(x), plain(x) / 2, atol=1e-5, rtol=1e-5)


def test_offsets_move_the_points():
    plain = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    deformable = DeformConv2d(plain)
    with torch.no_grad():  # (dy, dx) of each point: one row down, two columns right
        deformable.offset.bias.copy_(torch.tensor([1.0, 2.0] * 9))
    x = torch.randn(1, 2, 10, 12)
    torch.testing.assert_close(deformable(x)[:, :, :-2, :-3], plain(x)[:, :, 1:-1, 2:-1], atol=1e-5, rtol=1e-5)


def test_groups_of_channels_move_apart():
    plain = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
    deformable = DeformConv2d(plain, modulated=True, offset_groups=2)
    with torch.no_grad():  # the first half of the channels stays, the second goes two columns to the right
        deformable.offset.bias.copy_(torch.tensor([0.0, 0] * 9 + [0.0, 2] * 9 + [0.0] * 18))
    x = torch.randn(1, 4, 8, 12)
    found, expected = 2 * deformable(x), plain(x)
    torch.testing.assert_close(found[:, :2], expected[:, :2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 2:, :, 1:-3], expected[:, 2:, :, 3:-1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="offset_groups=3"):
        DeformConv2d(plain, offset_groups=3)


def test_gradients_reach_the_offsets():
    layer = DeformConv2d(nn.Conv2d(2, 2, 3, padding=1, bias=False), modulated=True)
    layer(torch.randn(1, 2, 6, 6)).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.abs().sum() > 0


def test_in_a_resnet_plain_weights_start_it():
    theirs, ours = resnet50(), ResNet(50, deform_stages=[4, 5])
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert all(".offset." in key for key in missing) and all(key.startswith("fc.") for key in unexpected)
    assert isinstance(ours.layer3[0].conv2, DeformConv2d) and not isinstance(ours.layer2[0].conv2, DeformConv2d)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval().layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images)))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(expected)))
        torch.testing.assert_close(ours.eval()(images)[-1], expected, atol=1e-4, rtol=1e-4)


def test_refused():
    with pytest.raises(ValueError, match=r"deform_stages=\[3\]"):
        ResNet(18, deform_stages=[3])
    with pytest.raises(ValueError, match=r"deform_stages=\[5\]"):
        ResNet(50, stages=[4], deform_stages=[5])
