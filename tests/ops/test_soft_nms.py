"""Soft-NMS against the algorithm of its paper, box by box."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from detector.ops.boxes import nms_by_image, soft_nms_by_image


def random_boxes(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(count, 2, generator=generator)], dim=1)
    return boxes, torch.rand(count, generator=generator)


def by_the_paper(boxes, scores, decay, threshold, sigma, min_score) -> tuple[list[int], list[float]]:
    """Figure 2 of Bodla et al. for one image and class."""
    iou, scores, left, kept, values = box_iou(boxes, boxes), scores.tolist(), set(range(len(boxes))), [], []
    while left:
        best = max(left, key=lambda i: scores[i])
        if scores[best] <= min_score:
            break
        left.remove(best)
        kept.append(best)
        values.append(scores[best])
        for i in left:
            overlap = float(iou[best, i])
            if decay == "gaussian":
                scores[i] *= float(torch.exp(torch.tensor(-(overlap**2) / sigma)))
            elif overlap > threshold:
                scores[i] *= 1 - overlap
    return kept, values


@pytest.mark.parametrize("decay", ["linear", "gaussian"])
def test_as_in_the_paper(decay):
    boxes, scores = random_boxes(30)
    zeros = torch.zeros(30, dtype=torch.long)
    rows, valid, changed = soft_nms_by_image(boxes, scores, zeros, zeros, 0.3, 1, 100, decay, 0.1)
    kept, values = by_the_paper(boxes, scores, decay, 0.3, 0.5, 0.1)
    assert rows[0][valid[0]].tolist() == kept
    torch.testing.assert_close(changed[rows[0][valid[0]]], torch.tensor(values))
    assert len(kept) > len(nms_by_image(boxes, scores, zeros, zeros, 0.3, 1, 100)[1][0].nonzero()) - 3


def test_images_and_groups_do_not_meet():
    boxes, scores = random_boxes(24)
    image = torch.arange(24) % 2
    group = torch.arange(24) // 2 % 3
    rows, valid, changed = soft_nms_by_image(boxes, scores, image, group, 0.3, 3, 100, "linear", 0.05)
    assert not valid[2].any()  # an image without boxes
    for i in range(2):
        for g in range(3):
            mine = torch.nonzero((image == i) & (group == g))[:, 0]
            kept, values = by_the_paper(boxes[mine], scores[mine], "linear", 0.3, 0.5, 0.05)
            found = [r for r in rows[i][valid[i]].tolist() if r in mine.tolist()]
            assert found == mine[kept].tolist()
            torch.testing.assert_close(changed[found], torch.tensor(values))
    ranked = changed[rows[0][valid[0]]]
    assert (ranked[:-1] >= ranked[1:]).all()


def test_no_more_than_the_limit():
    boxes, scores = random_boxes(20)
    zeros = torch.zeros(20, dtype=torch.long)
    rows, valid, _ = soft_nms_by_image(boxes, scores, zeros, zeros, 0.5, 1, 7)
    assert rows.shape == valid.shape == (1, 7) and valid.all()
