"""Which ground-truth box each anchor or proposal answers for, and random subsets of them to train on.

Matching is Faster R-CNN's (Ren et al. 2015, section 3.1.2). Subsets are drawn without a random number generator: the
order in which candidates are drawn is a hash of (sample key of the image, stage, candidate index). So what is drawn
depends on the image alone: not on the rank, the batch it travels in, what was drawn before, or the RoI method. Runs
that are resumed, spread over several processes or compared with each other see the same samples.

Dimensions: N images, G ground-truth boxes (padded), A anchors or proposals (the candidates), S samples per image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detector.ops.boxes import area, intersection, take
from detector.structures import Targets

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


class Matches(NamedTuple):
    matched_idxs: Tensor  # [N, A] index of the best ground-truth box, whatever the verdict
    verdict: Tensor  # [N, A] int8: POSITIVE, NEGATIVE or IGNORED
    iou: Tensor  # [N, A] with that box, -1 without any


def check_thresholds(negative_iou: float, positive_iou: float) -> None:
    """ValueError unless 0 <= negative_iou <= positive_iou <= 1."""
    if not 0 <= negative_iou <= positive_iou <= 1:
        raise ValueError(
            f"negative_iou={negative_iou}, positive_iou={positive_iou}: expected 0 <= negative_iou <= positive_iou <= 1"
        )


def match(
    boxes: Tensor,
    targets: Targets,
    low: float | Tensor,
    high: float | Tensor,
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
    return Matches(matched_idxs, verdict.to(torch.int8), best)


# SplitMix64 (Steele, Lea and Flood 2014), its constants as signed 64-bit integers.
_GAMMA, _MIX1, _MIX2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


class Samples(NamedTuple):
    indices: Tensor  # [N, S] into the candidates, positives first
    valid: Tensor  # [N, S] bool
    positive: Tensor  # [N, S] bool, a subset of valid


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 arithmetically; this is the logical shift


def random_keys(sample_keys: Tensor, count: int, stage: int) -> Tensor:
    """Pseudo-random int64 >= 0, [N, count], a function of (sample_keys [N], stage, position) alone."""
    position = torch.arange(1, count + 1, device=sample_keys.device)

    def mix(x: Tensor) -> Tensor:
        x = (x ^ _shift(x, 30)) * _MIX1
        x = (x ^ _shift(x, 27)) * _MIX2
        return x ^ _shift(x, 31)

    state = mix(mix(sample_keys + _GAMMA) + stage)
    return _shift(mix(state[:, None] + position * _GAMMA), 1)


def sample(
    verdict: Tensor, sample_keys: Tensor, batch_size_per_image: int, positive_fraction: float, stage: int
) -> Samples:
    """Draw up to `batch_size_per_image` candidates of each image, at most `positive_fraction` of them positives.

    Args:
        verdict: [N, A] of `match`. sample_keys: [N] int64. stage: a small integer, another one for every use.

    Missing positives are made up by negatives. With S = min(batch_size_per_image, A), returns Samples of [N, S].
    """
    keys = random_keys(sample_keys, verdict.shape[1], stage)
    size = min(batch_size_per_image, verdict.shape[1])
    max_positives = min(int(batch_size_per_image * positive_fraction), size)
    is_positive, is_negative = verdict == POSITIVE, verdict == NEGATIVE

    positives = torch.where(is_positive, keys, -1).topk(max_positives, dim=1)
    negatives = torch.where(is_negative, keys, -1).topk(size, dim=1)
    drawn_positives = positives.values >= 0
    room = size - drawn_positives.sum(dim=1, keepdim=True)
    drawn_negatives = (negatives.values >= 0) & (torch.arange(size, device=keys.device) < room)

    indices = torch.cat([positives.indices, negatives.indices], dim=1)
    valid = torch.cat([drawn_positives, drawn_negatives], dim=1)
    front = torch.argsort((~valid).to(torch.uint8), dim=1, stable=True)[:, :size]
    indices, valid = take(indices, front), take(valid, front)
    return Samples(indices, valid, valid & take(is_positive, indices))
