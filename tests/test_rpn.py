"""The RPN's head on a sample of the anchors against the head on whole maps: the same values and gradients."""

import pytest
import torch

from detector.ops.boxes import take
from detector.rpn import RPNHead

SHAPES = [(7, 9), (4, 5), (2, 3), (1, 1)]


@pytest.mark.parametrize("convolutions", [1, 2, 3])
def test_at_equals_whole_maps(convolutions):
    torch.manual_seed(0)
    head = RPNHead(6, 3, [6] * convolutions).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases too: what lies beyond the map must not get one
    features = [torch.randn(2, 6, *shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    total = 3 * sum(h * w for h, w in SHAPES)
    anchors = torch.stack([torch.randperm(total) for _ in range(2)])  # every anchor, those at the borders included
    weights = torch.randn(2, total, 5, dtype=torch.float64)

    outcomes = []
    for sampled in (False, True):
        if sampled:
            logits, deltas = head.at(features, anchors)
        else:
            logits, deltas = (take(torch.cat(t, 1), anchors) for t in head(features))
        loss = (torch.cat([logits[..., None], deltas], -1) * weights).sum()
        outcomes.append([logits, deltas, *torch.autograd.grad(loss, [*features, *head.parameters()])])
    for dense, sparse in zip(*outcomes):
        torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-9)


def test_repeated_and_few_anchors():
    """Padding repeats anchors; a gradient then adds up."""
    head = RPNHead(4, 3, [4])
    features = [torch.randn(1, 4, 3, 3, requires_grad=True)]
    once, _ = head.at(features, torch.tensor([[13]]))
    (gradient,) = torch.autograd.grad(once.sum(), features)
    twice, _ = head.at(features, torch.tensor([[13, 13]]))
    torch.testing.assert_close(torch.autograd.grad(twice.sum(), features)[0], 2 * gradient)
    assert gradient.abs().amax(1).gt(0).all(), "the middle cell sees the whole map of 3 x 3"
