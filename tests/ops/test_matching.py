"""Matching: thresholds, low-quality matches, crowd regions, padding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from detector.ops.sampling import IGNORED, NEGATIVE, POSITIVE, match
from detector.structures import Targets
from tests.ops.test_boxes import random_boxes


def targets(boxes, labels=None, valid=None, crowd=None):
    n, g = boxes.shape[:2]
    return Targets(
        boxes,
        torch.ones(n, g, dtype=torch.long) if labels is None else labels,
        torch.ones(n, g, dtype=torch.bool) if valid is None else valid,
        torch.zeros(n, g, dtype=torch.bool) if crowd is None else crowd,
    )


def test_thresholds():
    gt = torch.tensor([[[0.0, 0, 10, 10]]])
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 2], [20, 20, 30, 30]])  # IoU 1, 0.5, 0.2, 0
    matches = match(anchors, targets(gt), low=0.3, high=0.7)
    assert matches.verdict.tolist() == [[POSITIVE, IGNORED, NEGATIVE, NEGATIVE]]


def test_low_quality_makes_the_best_anchor_of_each_object_positive():
    gt = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 60, 60]]])
    anchors = torch.tensor([[0.0, 0, 10, 4], [0, 0, 10, 3], [50, 50, 60, 52], [80, 80, 90, 90]])
    plain = match(anchors, targets(gt), 0.3, 0.7)
    assert (plain.verdict != POSITIVE).all()
    matches = match(anchors, targets(gt), 0.3, 0.7, low_quality=True)
    assert matches.verdict.tolist() == [[POSITIVE, IGNORED, POSITIVE, NEGATIVE]]
    assert matches.matched_idxs[0, [0, 2]].tolist() == [0, 1]


def test_an_object_that_no_anchor_touches_makes_nothing_positive():
    gt = torch.tensor([[[500.0, 500, 510, 510]]])
    matches = match(random_boxes(20), targets(gt), 0.3, 0.7, low_quality=True)
    assert (matches.verdict == NEGATIVE).all()


def test_crowd_ignores_negatives_inside_and_is_never_matched():
    gt = torch.tensor([[[0.0, 0, 100, 100], [0, 0, 10, 10]]])
    crowd = torch.tensor([[True, False]])
    anchors = torch.tensor([[0.0, 0, 10, 10], [40, 40, 60, 60], [90, 90, 150, 150], [0, 0, 100, 100]])
    matches = match(anchors, targets(gt, crowd=crowd), 0.3, 0.7)
    assert matches.verdict.tolist() == [[POSITIVE, IGNORED, NEGATIVE, IGNORED]]
    assert matches.matched_idxs[0, 0] == 1


def test_padding_and_images_without_objects_match_nothing():
    gt = torch.tensor([[[0.0, 0, 10, 10]], [[0.0, 0, 10, 10]]])
    valid = torch.tensor([[False], [True]])
    matches = match(gt[0], targets(gt, valid=valid), 0.3, 0.7, low_quality=True)
    assert matches.verdict.tolist() == [[NEGATIVE], [POSITIVE]]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.booleans())
def test_against_the_definition(seed, low_quality):
    gt, anchors = random_boxes(1, 4, seed=seed), random_boxes(12, seed=seed + 1)
    matches = match(anchors, targets(gt), 0.3, 0.5, low_quality)
    iou = box_iou(gt[0], anchors)
    for a in range(12):
        best = float(iou[:, a].max())
        expected = POSITIVE if best >= 0.5 else NEGATIVE if best < 0.3 else IGNORED
        if low_quality and any(iou[g, a] > 0 and iou[g, a] == iou[g].max() for g in range(4)):
            expected = POSITIVE
        assert matches.verdict[0, a] == expected
        assert iou[matches.matched_idxs[0, a], a] == best
