"""Which boxes a box head lets through."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from detector.heads import BoxHead, FCTrunk
from detector.roi import RoIAlign
from detector.rpn import RPN


@pytest.mark.parametrize("last, kept", [(False, [0.7, 0.6]), (True, [0.7])])
def test_boxes_without_a_size_may_take_part_in_nms(last, kept):
    """One lies beside the image: dropped before the two best are taken, or among them."""
    settings = {"detections_per_image": 2, "min_size_last": last, "trunk": partial(FCTrunk, fc_channels=[4])}
    head = BoxHead(2, [4], 1, RoIAlign, **settings)
    boxes = torch.tensor([[70.0, 0, 90, 20], [0, 0, 10, 10], [30, 30, 50, 50]])[:, None]
    sizes, image = torch.tensor([[64, 64]]), torch.zeros(3, dtype=torch.int64)
    found = head.select(boxes, torch.tensor([[0.9], [0.7], [0.6]]), image, sizes)
    assert found.scores[found.valid].tolist() == pytest.approx(kept)


def test_probabilities_are_sorted_only_to_leave_some_out():
    rpn = RPN(4, [8], [[16.0]], rank_by="probability")
    logits = torch.tensor([[1.0, 30, 2, 40, 0]])  # two are 1 in float32
    scores, index = rpn.best(logits, 5)
    assert index.tolist() == [[0, 1, 2, 3, 4]] and torch.equal(scores, logits.sigmoid())
    scores, index = rpn.best(logits, 3)
    assert sorted(index[0, :2].tolist()) == [1, 3] and index[0, 2] == 2
    assert scores[0].tolist() == pytest.approx([1, 1, 0.8808], abs=1e-4)
