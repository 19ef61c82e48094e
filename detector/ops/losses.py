"""Losses of the two stages, in float32, each a sum over rows divided by a count of samples over the whole global batch.

Dimensions: R rows (anchors, RoIs), K classes, M side of a predicted mask.
`weight` [R] is 1 for a real row and 0 for padding, so that the result never depends on the padding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import complete_box_iou_loss, generalized_box_iou_loss

from detector.ops.boxes import BoxCoder


def global_mean_count(count: Tensor) -> Tensor:
    """Mean over the ranks of `count`, at least 1.

    A loss summed over this rank's samples and divided by it gives, once the ranks' gradients are averaged, the gradient
    of a single process that sees the whole batch.
    """
    count = count.detach().float()
    if dist.is_available() and dist.is_initialized():
        count = count.clone()
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1)


def objectness(logits: Tensor, positive: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Binary cross-entropy of logits [R] against positive [R] (Faster R-CNN, Ren et al. 2015, eq. 1)."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="none")
    return (loss * weight).sum() / count


def classification(logits: Tensor, labels: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Softmax cross-entropy of logits [R, K + 1] against labels [R], 0 = background."""
    return (F.cross_entropy(logits.float(), labels, reduction="none") * weight).sum() / count


def smooth_l1(deltas: Tensor, target: Tensor, beta: float) -> Tensor:
    """Smooth L1 per row [R] of deltas [R, 4] (Fast R-CNN, Girshick 2015, eq. 3); beta = 0 is L1."""
    difference = (deltas.float() - target).abs()
    if beta == 0:
        return difference.sum(dim=-1)
    return torch.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta).sum(dim=-1)


# What a box loss compares: the deltas, or the boxes that they decode to.
DELTA_LOSSES: dict[str, Callable[..., Tensor]] = {"smooth_l1": smooth_l1, "l1": partial(smooth_l1, beta=0.0)}
BOX_LOSSES: dict[str, Callable[..., Tensor]] = {
    "giou": partial(generalized_box_iou_loss, reduction="none"),  # Rezatofighi et al. 2019
    "ciou": partial(complete_box_iou_loss, reduction="none"),  # Zheng et al. 2020
}


class BoxLoss:
    """Box regression loss by name, summed over positive rows.

    Args:
        coder: between boxes and deltas.
        name: 'smooth_l1', 'l1' (on deltas), 'giou' or 'ciou' (on decoded boxes).
        beta: where smooth L1 turns from quadratic to linear, in delta units.
    """

    def __init__(self, coder: BoxCoder, name: str = "smooth_l1", beta: float = 1.0 / 9):
        if name not in DELTA_LOSSES | BOX_LOSSES:
            raise ValueError(f"box_loss={name!r}: expected one of {', '.join(DELTA_LOSSES | BOX_LOSSES)}")
        if beta < 0:
            raise ValueError(f"beta={beta}: must not be negative")
        self.coder, self.on_boxes = coder, name in BOX_LOSSES
        self.loss = partial(smooth_l1, beta=beta) if name == "smooth_l1" else (DELTA_LOSSES | BOX_LOSSES)[name]

    def __call__(self, deltas: Tensor, boxes: Tensor, anchors: Tensor, weight: Tensor, count: Tensor) -> Tensor:
        """deltas [R, 4] predicted at anchors [R, 4], boxes [R, 4] wanted, weight [R]."""
        if self.on_boxes:
            loss = self.loss(self.coder.decode(deltas, anchors), boxes)
        else:
            loss = self.loss(deltas, self.coder.encode(boxes, anchors))
        # where, not a product: a padded row may hold inf or NaN.
        return torch.where(weight > 0, loss * weight, 0.0).sum() / count


def mask(logits: Tensor, target: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Per-pixel binary cross-entropy of logits [R, M, M] against target [R, M, M] (Mask R-CNN, He et al. 2017)."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return (loss.mean(dim=(1, 2)) * weight).sum() / count


def offset_l2(offsets: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Mean squared normalised offset of offsets [R, 2, h, w], which keeps learned offsets from diverging."""
    return (offsets.float().pow(2).mean(dim=(1, 2, 3)) * weight).sum() / count
