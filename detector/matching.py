"""Which ground-truth box each anchor or proposal answers for (Faster R-CNN, Ren et al. 2015, section 3.1.2).

Dimensions: N images, G ground-truth boxes (padded), A anchors or proposals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detector.boxes import area, intersection
from detector.structures import Targets

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


class Matches(NamedTuple):
    matched_idxs: Tensor  # [N, A] index of the best ground-truth box, whatever the verdict
    verdict: Tensor  # [N, A] int8: POSITIVE, NEGATIVE or IGNORED


def check_thresholds(negative_iou: float, positive_iou: float) -> None:
    """ValueError unless 0 <= negative_iou <= positive_iou <= 1."""
    if not 0 <= negative_iou <= positive_iou <= 1:
        raise ValueError(
            f"negative_iou={negative_iou}, positive_iou={positive_iou}: expected 0 <= negative_iou <= positive_iou <= 1"
        )


def match(
    boxes: Tensor,
    targets: Targets,
    low: float,
    high: float,
    low_quality: bool = False,
    crowd_threshold: float = 0.7,
) -> Matches:
    """Match boxes [N, A, 4] (or [A, 4], shared by the images) to the ground truth by overlap.

    IoU >= high is positive, < low negative, between the two ignored. With `low_quality`, the boxes with the highest
    IoU of a ground-truth box are positive too, however low that is. A negative that lies inside a crowd region by at
    least `crowd_threshold` of its own area is ignored: nobody knows what is in there.
    """
    # One pass over all pairs [N, G, A]: IoU for objects, the share of the box inside for crowd regions.
    quality = intersection(targets.boxes, boxes)
    box_area = area(boxes)[..., None, :]
    crowd = targets.crowd[:, :, None]
    union = torch.where(crowd, box_area, area(targets.boxes)[:, :, None] + box_area - quality)
    quality = quality.div_(union.clamp_(min=1e-9))

    is_object = (targets.valid & ~targets.crowd)[:, :, None]
    iou = torch.where(is_object, quality, -1.0)
    best, matched_idxs = iou.max(dim=1)
    positive = best >= high
    if low_quality:
        best_per_object = iou.amax(dim=2, keepdim=True)
        positive = positive | ((iou == best_per_object) & (best_per_object > 0)).any(dim=1)
    in_crowd = torch.where(targets.valid[:, :, None] & crowd, quality, -1.0).amax(dim=1) >= crowd_threshold

    verdict = torch.where(positive, POSITIVE, torch.where((best < low) & ~in_crowd, NEGATIVE, IGNORED))
    return Matches(matched_idxs, verdict.to(torch.int8))
