"""Box arithmetic against plain definitions."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from detector.ops.boxes import (
    BoxCoder,
    clip,
    group_by_image,
    nms_by_image,
    nms_like_mmcv,
    of_label,
    pairwise_iou,
    soft_nms_by_image,
    survivors,
    take,
)


def random_boxes(*shape, size=100.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, 2, generator=generator) * size
    return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)


def test_pairwise_iou_equals_torchvision_and_is_zero_for_empty_boxes():
    a, b = random_boxes(2, 5), random_boxes(2, 7, seed=1)
    a[0, 0] = 0
    b[0, 0] = 0
    iou = pairwise_iou(a, b)
    for i in range(2):
        torch.testing.assert_close(iou[i], box_iou(a[i], b[i]).nan_to_num(0))
    assert iou[0, 0, 0] == 0


def test_pairwise_iou_shares_boxes_between_images():
    a, b = random_boxes(3, 4), random_boxes(6, seed=2)
    torch.testing.assert_close(pairwise_iou(a, b), pairwise_iou(a, b.expand(3, -1, -1)))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 1000), st.tuples(*[st.floats(0.5, 20)] * 4))
def test_coder_round_trip(seed, weights):
    boxes, anchors = random_boxes(8, seed=seed) + torch.tensor([0, 0, 4, 4]), random_boxes(8, seed=seed + 1)
    anchors = anchors + torch.tensor([0, 0, 4, 4])
    coder = BoxCoder(weights)
    torch.testing.assert_close(coder.decode(coder.encode(boxes, anchors), anchors), boxes, atol=1e-3, rtol=1e-4)


def test_coder_worked_example_and_limit():
    coder = BoxCoder((10, 10, 5, 5))
    anchor = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # centre (20, 40), 20 x 40
    box = torch.tensor([[14.0, 20.0, 54.0, 100.0]])  # centre (34, 60), 40 x 80
    deltas = coder.encode(box, anchor)
    log2 = 0.6931472
    torch.testing.assert_close(deltas, torch.tensor([[7.0, 5.0, 5 * log2, 5 * log2]]))
    grown = coder.decode(torch.tensor([[0.0, 0, 1000, 0]]), anchor)
    assert float(grown[0, 2] - grown[0, 0]) == pytest.approx(20 * 1000 / 16, rel=1e-5)


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 1, 0)])
def test_coder_refuses_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        BoxCoder(weights)


def test_clip_uses_each_images_size():
    boxes = torch.tensor([[-5.0, -5, 500, 500]]).expand(2, 3, 4)
    clipped = clip(boxes, torch.tensor([[40, 60], [100, 20]]))
    assert clipped[0, 0].tolist() == [0, 0, 60, 40]
    assert clipped[1, 2].tolist() == [0, 0, 20, 100]


def plain_nms(boxes, scores, threshold):
    """Greedy suppression as it is defined: take the best, drop what overlaps it, repeat."""
    left = sorted(range(len(boxes)), key=lambda i: -scores[i])
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if box_iou(boxes[best][None], boxes[i][None])[0, 0] <= threshold]
    return kept


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 25), st.floats(0.1, 0.9), st.integers(1, 6))
def test_nms_by_image_equals_the_plain_definition(seed, count, threshold, limit):
    generator = torch.Generator().manual_seed(seed)
    boxes, scores = random_boxes(count, seed=seed), torch.rand(count, generator=generator)
    image = torch.randint(0, 3, (count,), generator=generator)
    group = torch.randint(0, 2, (count,), generator=generator)
    rows, valid = nms_by_image(boxes, scores, image, group, threshold, images=3, limit=limit)
    assert rows.shape == valid.shape == (3, limit)
    for i in range(3):
        expected = []
        for g in range(2):
            mine = torch.nonzero((image == i) & (group == g))[:, 0]
            expected += mine[plain_nms(boxes[mine], scores[mine].tolist(), threshold)].tolist()
        expected = sorted(expected, key=lambda j: -scores[j])[:limit]
        assert rows[i][valid[i]].tolist() == expected


def test_group_by_image_keeps_order_and_drops_the_rest():
    rows, valid = group_by_image(torch.tensor([7, 3, 9, 1]), torch.tensor([1, 0, 1, 1]), images=3, limit=2)
    assert rows[valid].tolist() == [3, 7, 9]
    assert valid.tolist() == [[True, False], [True, True], [False, False]]


def test_take_and_of_label():
    values = torch.arange(24).view(2, 3, 4)
    index = torch.tensor([[2, 0], [1, 1]])
    assert take(values, index)[:, 0, 0].tolist() == [8, 16]
    per_class = torch.arange(6).view(2, 3)
    assert of_label(per_class, torch.tensor([3, 1])).tolist() == [2, 3]
    assert of_label(per_class[:, :1], torch.tensor([3, 1])).tolist() == [0, 3]


def test_nms_like_mmcv_differs_only_in_ties():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=generator) * 100
    boxes = torch.cat([corners, corners + 5 + torch.rand(300, 2, generator=generator) * 40], dim=1)
    image, group = torch.arange(300) % 3, torch.arange(300) // 3 % 2
    image[image == 1] = 0  # an image without boxes
    scores = torch.randperm(300, generator=generator) / 300
    args = image, group, 0.5, 3, 40
    rows, valid = nms_like_mmcv(boxes, scores, *args)
    expected, there = nms_by_image(boxes, scores, *args)
    assert torch.equal(valid, there) and torch.equal(rows[valid], expected[there])
    same = torch.full_like(scores, 0.5)  # boxes that do not overlap come in the order of torch's sort
    apart = torch.arange(300.0)[:, None].expand(-1, 4) * 10 + torch.tensor([0.0, 0, 1, 1])
    first = nms_like_mmcv(apart, same, torch.zeros_like(image), group, 0.5, 1, 300)[0][0]
    assert torch.equal(first, same.sort(descending=True)[1])
    none = nms_like_mmcv(boxes[:0], scores[:0], image[:0], group[:0], 0.5, 2, 4)
    assert not none[1].any() and none[0].shape == (2, 4)


def test_survivors_of_a_table_for_two_images():
    """The second one has no boxes that take part."""
    boxes = torch.tensor(
        [[[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 20, 30, 30]], [[0, 0, 9, 9], [0, 0, 9, 9], [0, 0, 9, 9]]]
    )
    scores, group = torch.tensor([[0.5, 0.9, 0.7], [0.8, 0.8, 0.8]]), torch.zeros(2, 3, dtype=torch.long)
    wanted, image = torch.tensor([[True, True, True], [False, False, False]]), torch.arange(2)
    for nms in (nms_by_image, nms_like_mmcv):
        left = survivors(boxes, scores, wanted, image, group, nms, 0.5, 2, 4)
        assert left.valid.tolist() == [[True, True, False, False], [False] * 4]
        assert left.column[0, :2].tolist() == [1, 2] and left.scores[0].tolist() == pytest.approx([0.9, 0.7, 0, 0])
        assert torch.equal(left.of(boxes)[0, :2], boxes[0, [1, 2]])
        assert not left.of(boxes)[~left.valid].any()
    softer = partial(soft_nms_by_image, decay="linear", min_score=0.05)
    left = survivors(boxes, scores, wanted, image, group, softer, 0.5, 2, 4)
    assert left.column[0, :3].tolist() == [1, 2, 0]
    assert left.scores[0].tolist() == pytest.approx([0.9, 0.7, 0.5 * (1 - 90 / 110), 0])
    boxes[0, 0] = torch.nan  # what padding points at may be anything
    nothing = survivors(boxes, scores, wanted & False, image, group, nms_by_image, 0.5, 2, 4)
    assert not nothing.valid.any() and not nothing.of(boxes).any() and not nothing.scores.any()
