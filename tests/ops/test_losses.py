"""Losses against torch's and torchvision's, with padding and empty rows."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import generalized_box_iou_loss

from detector.ops import losses
from detector.ops.boxes import BoxCoder
from tests.ops.test_boxes import random_boxes


def test_classification_ignores_padding():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    weight = torch.tensor([1.0, 1, 1, 1, 0, 0])
    found = losses.classification(logits, labels, weight, weight.sum())
    torch.testing.assert_close(found, F.cross_entropy(logits[:4], labels[:4]))


def test_objectness_equals_torch():
    logits, positive = torch.randn(9), torch.arange(9) % 2 == 0
    found = losses.objectness(logits, positive, torch.ones(9), torch.tensor(9.0))
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, positive.float()))


@pytest.mark.parametrize("beta", [1.0 / 9, 1.0])
def test_smooth_l1_equals_torch(beta):
    a, b = torch.randn(7, 4), torch.randn(7, 4)
    expected = F.smooth_l1_loss(a, b, beta=beta, reduction="none").sum(1)
    torch.testing.assert_close(losses.smooth_l1(a, b, beta), expected)
    torch.testing.assert_close(losses.smooth_l1(a, b, 0.0), (a - b).abs().sum(1))


def test_giou_is_taken_on_boxes():
    coder, anchors, wanted = BoxCoder((10, 10, 5, 5)), random_boxes(5), random_boxes(5, seed=1)
    deltas = torch.randn(5, 4)
    found = losses.BoxLoss(coder, "giou")(deltas, wanted, anchors, torch.ones(5), torch.tensor(5.0))
    expected = generalized_box_iou_loss(coder.decode(deltas, anchors), wanted, reduction="mean")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["smooth_l1", "l1", "giou", "ciou"])
def test_padding_rows_of_any_value_do_not_count(name):
    coder, anchors, wanted = BoxCoder(), random_boxes(4), random_boxes(4, seed=1)
    deltas = torch.randn(4, 4, requires_grad=True)
    weight, count = torch.tensor([1.0, 1, 0, 0]), torch.tensor(2.0)
    loss = losses.BoxLoss(coder, name)
    expected = loss(deltas[:2], wanted[:2], anchors[:2], weight[:2], count)
    anchors[2:] = 0
    wanted[2:] = float("nan")
    found = loss(deltas, wanted, anchors, weight, count)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["smooth_l1", "l1", "giou", "ciou"])
def test_no_rows_give_zero_with_a_gradient(name):
    deltas = torch.zeros(0, 4, requires_grad=True)
    empty, count = torch.zeros(0, 4), losses.global_mean_count(torch.tensor(0))
    loss = losses.BoxLoss(BoxCoder(), name)(deltas, empty, empty, torch.zeros(0), count)
    loss.backward()
    assert float(loss) == 0 and deltas.grad is not None


def test_unknown_box_loss_is_named():
    with pytest.raises(ValueError, match="smoothl1"):
        losses.BoxLoss(BoxCoder(), "smoothl1")


def test_mask_loss_is_a_mean_over_pixels_of_weighted_rows():
    logits, target = torch.randn(3, 4, 4), torch.rand(3, 4, 4)
    weight = torch.tensor([1.0, 0.0, 1.0])
    expected = F.binary_cross_entropy_with_logits(logits[[0, 2]], target[[0, 2]])
    torch.testing.assert_close(losses.mask(logits, target, weight, weight.sum()), expected)


def test_offset_l2():
    offsets = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(2, 2, 7, 7)
    found = losses.offset_l2(offsets, torch.tensor([1.0, 0.0]), torch.tensor(1.0))
    assert float(found) == 12.5
