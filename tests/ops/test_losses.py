"""Losses against torch's and torchvision's, with padding and empty rows."""

import math

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
    found = (losses.CrossEntropy(3)(logits, labels, weight) * weight).sum() / weight.sum()
    torch.testing.assert_close(found, F.cross_entropy(logits[:4], labels[:4]))


def rows_of_logits(rows: int = 12, classes: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(rows, classes + 1, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, classes + 1, (rows,), generator=generator), torch.ones(rows)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
def test_focal_loss_is_equation_4(gamma):
    logits, labels, weight = rows_of_logits()
    loss = losses.Focal(4, gamma)
    for row, label, found in zip(logits, labels, loss(logits, labels, weight)):
        p = math.exp(row[label]) / sum(math.exp(value) for value in row)
        assert float(found) == pytest.approx(-((1 - p) ** gamma) * math.log(p), rel=1e-9)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, weight), logits.requires_grad_())
    sure = torch.tensor([[0.0, 90.0]], requires_grad=True)
    loss = losses.Focal(1, gamma)(sure, torch.tensor([1]), torch.ones(1)).sum()
    loss.backward()
    assert loss == 0 and sure.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"gamma = 0\.5: must be 0, or at least 1"):
        losses.Focal(4, 0.5)


def seesaw(row, label: int, seen, p: float, q: float) -> float:
    """Wang et al. 2021, equations 4 to 7, with background as a class that takes no part."""
    total = sum(math.exp(value) for value in row)
    score = [math.exp(value) / total for value in row]
    denominator = 0.0
    for j, value in enumerate(row):
        factor = 1.0
        if label > 0 and j > 0:
            n_i, n_j = max(1, seen[label - 1]), max(1, seen[j - 1])
            mitigation = 1.0 if n_i <= n_j else (n_j / n_i) ** p
            compensation = 1.0 if score[j] <= score[label] else (score[j] / score[label]) ** q
            factor = mitigation * compensation
        denominator += factor * math.exp(value)
    return -math.log(math.exp(row[label]) / denominator)


@pytest.mark.parametrize(("p", "q"), [(0.8, 2.0), (0.8, 0.0), (0.0, 2.0), (0.0, 0.0)])
def test_seesaw_loss_is_that_of_the_paper(p, q):
    logits, labels, weight = rows_of_logits()
    loss = losses.Seesaw(4, p, q).eval()
    loss.seen += torch.tensor([1000, 50, 3, 0])
    found = loss(logits.requires_grad_(), labels, weight)
    wanted = [seesaw(row, label, loss.seen.tolist(), p, q) for row, label in zip(logits.tolist(), labels.tolist())]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    if q == 0:  # with compensation the scores, which are taken as constants, move too
        assert torch.autograd.gradcheck(lambda x: loss(x, labels, weight), logits)
        return
    found.sum().backward()
    with torch.no_grad():  # constant factors: softmax with them, less the label's one
        scores = logits.softmax(1)
        factors = torch.ones_like(scores)
        for r, label in enumerate(labels.tolist()):
            for j in range(1, 5) if label else ():
                n_i, n_j = (max(1, int(loss.seen[k - 1])) for k in (label, j))
                higher = max(1.0, float(scores[r, j] / scores[r, label]))
                factors[r, j] = min(1.0, n_j / n_i) ** p * higher**q
        gradient = factors * logits.exp() / (factors * logits.exp()).sum(1, keepdim=True)
        gradient -= F.one_hot(labels, 5)
    torch.testing.assert_close(logits.grad, gradient)


def test_seesaw_counts_the_rows_that_are_trained_on(monkeypatch):
    loss = losses.Seesaw(3)
    labels = torch.tensor([0, 1, 1, 3, 3])
    logits, weight = torch.zeros(5, 4), torch.tensor([1.0, 1, 1, 1, 0])
    assert loss(logits, labels, weight).isfinite().all() and loss.seen.tolist() == [2, 0, 1]
    loss.eval()(logits, labels, weight)
    assert loss.seen.tolist() == [2, 0, 1]
    monkeypatch.setattr(losses, "several_ranks", lambda: True)
    monkeypatch.setattr(losses.dist, "all_reduce", lambda counts: counts.mul_(2))
    loss.train()(logits, labels, weight)
    assert loss.seen.tolist() == [6, 0, 3]


@pytest.mark.parametrize("kind", [losses.CrossEntropy, losses.Focal, losses.Seesaw])
def test_class_losses_without_rows_have_a_gradient(kind):
    logits = torch.zeros(0, 4, requires_grad=True)
    kind(3)(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0)).sum().backward()
    assert logits.grad.shape == (0, 4)


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
