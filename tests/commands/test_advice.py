"""What is proposed for a data set, against sets whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detector.commands import advice
from detector.data import read_coco
from detector.rpn import AnchorGenerator
from tests.evaluation.test_coco import random_case


def boxes_of(shapes, size=(800, 1000), seed=0):
    """Boxes [M, 4] of these shapes (width, height) anywhere in their images, and the images' sizes [M, 2]."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, np.array(size)[::-1] - shapes)
    return torch.tensor(np.concatenate([corner, corner + shapes], 1)).float(), torch.tensor([size] * len(shapes))


def test_k_means_finds_the_shapes():
    rng = np.random.default_rng(0)
    centres = np.array([[10, 40], [60, 20], [200, 200]])
    shapes = centres[rng.integers(0, 3, 300)] * rng.uniform(0.95, 1.05, (300, 2))
    np.testing.assert_allclose(advice.k_means(shapes, 3), centres, rtol=0.05)


def test_proposed_anchors_reach_more():
    """Long, small objects, which the usual anchors of 32 to 512 px miss."""
    rng = np.random.default_rng(1)
    boxes, sizes = boxes_of(np.array([60.0, 8.0]) * rng.uniform(0.8, 1.25, (200, 2)))
    usual = [[32], [64], [128], [256], [512]]
    now, best = advice.propose_anchors(boxes, sizes, [4, 8, 16, 32, 64], usual, [0.5, 1.0, 2.0])
    assert now.sizes == usual and now.reached < 0.1 < 0.9 < best.reached and len(best.ratios) == 3
    generator = AnchorGenerator([4, 8, 16, 32, 64], best.sizes, best.ratios)
    reached = (advice.best_anchor_iou(boxes, sizes, generator) >= 0.5).float().mean()
    assert float(reached) == pytest.approx(best.reached)
    # one level with several sizes, as in models without a pyramid
    _, best = advice.propose_anchors(boxes, sizes, [16], [[32, 64, 128]], [0.5, 1.0, 2.0])
    assert len(best.sizes) == 1 and len(best.sizes[0]) == 3


def test_size_of_images():
    images = np.array([[600, 800]] * 10)
    assert advice.propose_edge(np.full(50, 40.0), images, 800) is None
    edge, why = advice.propose_edge(np.full(50, 10.0), images, 800)
    assert edge == 1216 and "below 10 px" in why  # about twice what the files have
    edge, why = advice.propose_edge(np.full(50, 200.0), images, 800)
    assert edge == 320 and "above 200 px" in why
    assert advice.propose_edge(np.zeros(0), images, 800) is None


def test_a_time_in_its_unit():
    assert advice.span(59) == "59 s" and advice.span(7200) == "2.0 h" and advice.span(150) == "2.5 min"


def test_noise_shrinks_with_the_images():
    """Four times as many images: about half the width."""
    widths = []
    for images in (12, 48, 192):
        truth = read_coco(random_case(0, images=images)[0]).truth
        value, low, high = advice.noise(truth, count=100)
        assert low < high and 0.2 < value < 0.8
        widths.append(high - low)
    assert widths[0] > 1.3 * widths[1] > 1.6 * widths[2]


def test_numbers_as_a_command_line_has_them():
    assert advice.bracketed([[29], [46.5]]) == "[[29],[46.5]]" and advice.bracketed((0.5, 1.0)) == "[0.5,1]"
