"""Level assignment: FPN's equation 1 and the three frameworks' ways around its boundaries."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops.poolers import initLevelMapper

from detector.roi import LEVEL_RULES, assign_levels, reference

STRIDES = (4, 8, 16, 32)


def squares(*sides: float) -> torch.Tensor:
    return torch.tensor([[10.0, 20.0, 10 + side, 20 + side] for side in sides])


@pytest.mark.parametrize("rule", LEVEL_RULES)
def test_sizes_between_the_boundaries(rule):
    sides = [1, 50, 111, 113, 223, 225, 447, 449, 2000]
    assert assign_levels(squares(*sides), STRIDES, rule=rule).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("rule", LEVEL_RULES)
@pytest.mark.parametrize(("side", "level"), [(112.0, 1), (224.0, 2), (448.0, 3)])
def test_exact_boundaries_go_up(rule, side, level):
    assert assign_levels(torch.tensor([[0.0, 0.0, side, side]]), STRIDES, rule=rule).item() == level


def test_rules_differ_just_below_a_boundary():
    """Just below 224: torchvision adds 1e-6 to the logarithm, mmdetection to its argument, detectron2 nothing."""
    boxes = torch.tensor([[0, 0, 224 * (1 - 4e-7), 224.0]], dtype=torch.float64)
    got = {rule: assign_levels(boxes, STRIDES, rule=rule).item() for rule in LEVEL_RULES}
    assert got == {"detectron2": 1, "torchvision": 2, "mmdetection": 2}
    boxes[0, 2] = 224 * (1 - 1.2e-6)  # half of it in the side's logarithm, 8.7e-7: too much for 1e-6 / 4 only
    got = {rule: assign_levels(boxes, STRIDES, rule=rule).item() for rule in LEVEL_RULES}
    assert got == {"detectron2": 1, "torchvision": 2, "mmdetection": 1}


@given(st.lists(st.tuples(st.floats(0.5, 2000), st.floats(0.5, 2000)), min_size=1, max_size=20))
def test_torchvision_rule_is_torchvisions(sides):
    boxes = torch.tensor([[3.0, 5.0, 3 + w, 5 + h] for w, h in sides])
    assert assign_levels(boxes, STRIDES, rule="torchvision").tolist() == initLevelMapper(2, 5)([boxes]).tolist()


@given(st.floats(1, 3000), st.floats(1, 3000))
def test_detectron2_rule_is_the_equation(w, h):
    scale = math.log2(math.sqrt(w * h) / 224)
    if abs(scale - round(scale)) > 1e-6:
        boxes = torch.tensor([[0, 0, w, h]], dtype=torch.float64)
        assert assign_levels(boxes, STRIDES).item() == reference.assign_level((0, 0, w, h), STRIDES)


@pytest.mark.parametrize("rule", LEVEL_RULES)
def test_boxes_without_a_size_read_the_finest_level(rule):
    nan, inf = math.nan, math.inf
    boxes = torch.tensor([[5, 5, 5, 5], [9, 9, 3, 20], [nan, 0, 5, 5], [0, 0, 0, inf]], dtype=torch.float32)
    assert assign_levels(boxes, STRIDES, rule=rule).tolist() == [0, 0, 0, 0]
    assert assign_levels(torch.tensor([[0, 0, inf, inf]]), STRIDES, rule=rule).item() == 3


def test_other_pyramids():
    boxes = squares(30, 60, 120, 240, 480, 960)
    assert assign_levels(boxes, (8, 16, 32)).tolist() == [0, 0, 0, 1, 2, 2]
    assert assign_levels(boxes, (16,)).tolist() == [0] * 6
    assert assign_levels(boxes, STRIDES, canonical_level=5).tolist() == [0, 1, 2, 3, 3, 3]
    assert assign_levels(boxes, STRIDES, canonical_size=112).tolist() == [0, 1, 2, 3, 3, 3]
    assert assign_levels(boxes[:0], STRIDES).shape == (0,)
    for rule in LEVEL_RULES:
        moved = assign_levels(boxes, (8, 16, 32), canonical_level=5, canonical_size=112, rule=rule)
        assert moved.tolist() == [0, 1, 2, 2, 2, 2]


def test_bad_input():
    boxes = squares(50)
    with pytest.raises(ValueError, match="rule"):
        assign_levels(boxes, STRIDES, rule="fpn")
    with pytest.raises(ValueError, match="double"):
        assign_levels(boxes, (4, 12))
    with pytest.raises(ValueError, match="double"):
        assign_levels(boxes, ())
    with pytest.raises(ValueError, match=r"boxes must have shape \[R, 4\], got \[1, 3\]"):
        assign_levels(boxes[:, :3], STRIDES)
