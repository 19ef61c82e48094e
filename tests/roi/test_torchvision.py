"""Where torchvision has the op: equal to it in float32, within 1e-5, and to the bit for the maximum of cells."""

from __future__ import annotations

import pytest
import torch
from torchvision import ops

from detector.roi import PositionSensitiveRoIAlign, PositionSensitiveRoIPool, RoIAlign, RoIExtractor, RoIPool
from tests.roi.common import STRIDES, make_features, make_rois

ROIS = make_rois(64, dtype=torch.float32)
ZEROS = torch.zeros(64, dtype=torch.int64)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def compare(op, torchvision_op, channels=4, exact=False):
    """Values and gradients of both on one map of stride 8."""
    mine = make_features(channels, dtype=torch.float32)[1].requires_grad_()
    theirs = mine.detach().clone().requires_grad_()
    actual = op([mine], ROIS, ZEROS, [8]).features
    expected = torchvision_op(theirs)
    assert actual.abs().sum() > 0
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    actual.backward(grad)
    expected.backward(grad)
    tolerance = {"rtol": 0, "atol": 0} if exact else CLOSE
    torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(mine.grad, theirs.grad, **CLOSE)


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (3, 5)], ids=str)
@pytest.mark.parametrize("sampling_ratio", [2, 0, 1])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align(aligned, sampling_ratio, size):
    compare(
        RoIAlign(size, sampling_ratio, aligned),
        lambda f: ops.roi_align(f, ROIS, size, 1 / 8, sampling_ratio or -1, aligned),
    )


@torch.no_grad()
@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_exact_roi_align_is_torchvisions_to_the_bit(sampling_ratio):
    features, levels = make_features(4, dtype=torch.float32), torch.arange(64) % len(STRIDES)
    actual = RoIAlign(7, sampling_ratio, exact=True)(features, ROIS, levels, STRIDES).features
    assert actual.is_contiguous()  # as what follows takes it
    for level, (feature, stride) in enumerate(zip(features, STRIDES)):
        expected = ops.roi_align(feature, ROIS[levels == level], 7, 1 / stride, sampling_ratio or -1, True)
        assert torch.equal(actual[levels == level], expected)


@pytest.mark.parametrize("size", [(7, 7), (3, 5)], ids=str)
def test_roi_pool(size):
    compare(RoIPool(size), lambda f: ops.roi_pool(f, ROIS, size, 1 / 8), exact=True)


@pytest.mark.parametrize("sampling_ratio", [2, 0])
def test_position_sensitive_align(sampling_ratio):
    compare(
        PositionSensitiveRoIAlign((3, 2), sampling_ratio),
        lambda f: ops.ps_roi_align(f, ROIS, (3, 2), 1 / 8, sampling_ratio or -1),
        channels=12,
    )


def test_position_sensitive_pool():
    """Values only: torchvision's backward pass spreads the gradient over other cells than its forward pass reads."""
    feature = make_features(12, dtype=torch.float32)[1]
    actual = PositionSensitiveRoIPool((3, 2), "torchvision")([feature], ROIS, ZEROS, [8]).features
    torch.testing.assert_close(actual, ops.ps_roi_pool(feature, ROIS, (3, 2), 1 / 8), **CLOSE)


def test_multi_scale_roi_align():
    """The whole pyramid: torchvision's level rule and its op, which is not aligned."""
    features = make_features(4, images=2, dtype=torch.float32)
    order = ROIS[:, 0].argsort(stable=True)  # torchvision wants the boxes image by image
    rois = ROIS[order]
    boxes = [rois[rois[:, 0] == image, 1:] for image in range(2)]
    pooler = ops.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    expected = pooler(dict(zip("0123", features)), boxes, [(160, 224)] * 2)
    actual = RoIExtractor(RoIAlign(7, aligned=False), STRIDES, level_rule="torchvision")(features, rois).features
    torch.testing.assert_close(actual, expected, **CLOSE)
