"""Losses of the two stages, in float32, each a sum over rows divided by a count of samples over the whole global batch.

Dimensions: R rows (anchors, RoIs), K classes, M side of a predicted mask.
`weight` [R] is 1 for a real row and 0 for padding, so that the result never depends on the padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import complete_box_iou_loss, generalized_box_iou_loss

from detector.ops.boxes import BoxCoder
from detector.ops.checks import require

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def several_ranks() -> bool:
    """Whether counts are those of all ranks together."""
    return dist.is_available() and dist.is_initialized() and not _ALONE.get()


@contextlib.contextmanager
def losses_of_one_rank() -> Iterator[None]:
    """Losses in this context are normalised over this rank's batch alone: others may take no step meanwhile."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def global_mean_count(count: Tensor) -> Tensor:
    """Mean over the ranks of `count`, at least 1.

    A loss summed over this rank's samples and divided by it gives, once the ranks' gradients are averaged, the gradient
    of a single process that sees the whole batch.
    """
    return global_mean(count.detach().float()).clamp(min=1)


def global_mean(value: Tensor) -> Tensor:
    """Mean over the ranks of a float tensor that has no gradient."""
    if several_ranks():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def objectness(logits: Tensor, positive: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """Binary cross-entropy of logits [R] against positive [R] (Faster R-CNN, Ren et al. 2015, eq. 1)."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="none")
    return (loss * weight).sum() / count


class CrossEntropy(nn.Module):
    """Softmax cross-entropy, per row [R], of class logits [R, K + 1] at labels [R], 0 = background."""

    def __init__(self, num_classes: int):
        super().__init__()

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")


class Focal(nn.Module):
    """Cross-entropy of which well-classified rows count little: (1 - p)^gamma * -log p (Lin et al. 2017, eq. 4).

    p is the softmax's probability of the label, background among the classes, so that inference stays as it is; the
    paper has a sigmoid for each class. Its alpha is `training.class_weights`.

    Args:
        gamma: 0 is the cross-entropy; else at least 1, below which certain rows have no gradient.
    """

    def __init__(self, num_classes: int, gamma: float = 2.0):
        super().__init__()
        require(gamma == 0 or gamma >= 1, "gamma", gamma, "0, or at least 1")
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, reduction="none")
        return (-torch.expm1(-loss)) ** self.gamma * loss


class Seesaw(nn.Module):
    """Cross-entropy in which frequent classes push rare ones down less (Wang et al. 2021, eq. 4 to 7).

    In the softmax of a row of class i the exponential of another class j is multiplied by
        M = min(1, N_j / N_i)^p    mitigation: N rows of a class have been trained on so far, on all ranks
        C = max(1, s_j / s_i)^q    compensation where j scores higher, s the plain softmax, a constant
    Background takes no part: neither rows of it nor its logit are changed. The paper predicts objectness by a branch of
    its own instead.

    Args:
        p, q: how strong both are; 0 switches one off.
    """

    seen: Tensor

    def __init__(self, num_classes: int, p: float = 0.8, q: float = 2.0):
        super().__init__()
        require(p >= 0, "p", p, "at least 0")
        require(q >= 0, "q", q, "at least 0")
        self.p, self.q = p, q
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.int64))  # N of classes 1..K

    def forward(self, logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """weight [R]: rows of weight 0 are not counted; in evaluation none is."""
        classes = torch.arange(len(self.seen) + 1, device=labels.device)
        if self.training:
            rows = ((labels[:, None] == classes[1:]) & (weight[:, None] > 0)).sum(0)
            if several_ranks():
                dist.all_reduce(rows)
            self.seen += rows
        with torch.no_grad():
            log_n = F.pad(self.seen.clamp(min=1).to(logits.dtype).log(), (1, 0))
            mitigation = self.p * (log_n - log_n[labels][:, None]).clamp(max=0)
            scores = F.log_softmax(logits, dim=1)
            compensation = self.q * (scores - scores.gather(1, labels[:, None])).clamp(min=0)
            foreground = (labels[:, None] > 0) & (classes > 0)
            log_factor = torch.where(foreground, mitigation + compensation, 0.0)
        return F.cross_entropy(logits + log_factor, labels, reduction="none")


def smooth_l1(deltas: Tensor, target: Tensor, beta: float | Tensor) -> Tensor:
    """Smooth L1 per row [R] of deltas [R, 4] (Fast R-CNN, Girshick 2015, eq. 3); beta = 0 is L1, as a tensor it must be
    positive."""
    difference = (deltas.float() - target).abs()
    if not isinstance(beta, Tensor) and beta == 0:
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
