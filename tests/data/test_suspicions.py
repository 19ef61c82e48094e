"""Boxes of another convention are noticed; boxes that are right never are."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from detector.data.suspicions import CORNERS, FRACTIONS, Boxes


def wrong_boxes(boxes, sizes) -> str | None:
    """What is told of boxes that come in two parts."""
    found, half = Boxes(), len(boxes) // 2
    found.add(boxes[:half], sizes[:half])
    found.add(boxes[half:], sizes[half:])
    return found.wrong()


def right(count: int, seed: int, side: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (x, y, width, height) inside images of side x 2 side."""
    chance = np.random.default_rng(seed)
    start = chance.uniform(0, 0.9, (count, 2))
    size = chance.uniform(0.02, 1, (count, 2)) * (1 - start)
    return np.concatenate([start, size], 1) * (2 * side, side, 2 * side, side), np.tile([side, 2 * side], (count, 1))


@given(count=st.integers(0, 60), seed=st.integers(0, 2**32), side=st.integers(16, 4000))
def test_right_boxes_are_never_wrong(count, seed, side):
    assert wrong_boxes(*right(count, seed, side)) is None


@given(count=st.integers(3, 60), seed=st.integers(0, 2**32), side=st.integers(16, 4000))
def test_fractions_are_noticed(count, seed, side):
    boxes, sizes = right(count, seed, side)
    assert wrong_boxes(boxes / (2 * side, side, 2 * side, side), sizes) == FRACTIONS


@given(count=st.integers(20, 60), seed=st.integers(0, 2**32))
def test_corners_are_noticed(count, seed):
    boxes, sizes = right(count, seed)
    assert wrong_boxes(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), sizes) == CORNERS


def test_objects_at_the_top_left_are_not_taken_for_corners():
    boxes = np.array([[1, 1, 20, 20], [2, 3, 30, 40], [0, 0, 50, 60], [5, 5, 90, 90]])
    assert wrong_boxes(boxes, np.full((4, 2), 100)) is None


def test_a_whole_image_and_a_few_boxes_out_of_it_are_let_be():
    boxes, sizes = right(40, 0)
    boxes[0] = [0, 0, 200, 100]
    boxes[1] = [150, 50, 160, 80]  # reaches out
    assert wrong_boxes(boxes, sizes) is None
    assert wrong_boxes([[0, 0, 1, 1]], [[100, 200]]) is None  # one object says little
