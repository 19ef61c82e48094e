"""Box arithmetic, batched over images.

Boxes are (x1, y1, x2, y2), continuous and half-open: the area is (x2 - x1) * (y2 - y1), without a "+ 1".
Deltas are (dx, dy, dw, dh) of R-CNN (Girshick et al. 2014, appendix C):
    dx = wx (x_gt - x_a) / w_a        dw = ww log(w_gt / w_a)        x: centre, w: width; y and h likewise
Dimensions: N images, G ground-truth boxes, A anchors or proposals, R RoIs, K classes, D detections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from detector.ops.kernels import triton_available

MOST = 1 << 18  # boxes that are suppressed on a GPU without first leaving out those that take no part
# A box may grow by this factor in one step: 1000 px from a stride-16 anchor, as in Detectron.
MAX_LOG_SCALE = math.log(1000.0 / 16)


def area(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4] in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Intersection areas [N, G, A] of a [N, G, 4] with b [N, A, 4] or [A, 4]."""
    a, b = a[:, :, None], b[..., None, :, :]
    # Coordinate by coordinate: a [N, G, A, 2] intermediate would be the largest tensor of the training step.
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    return width.mul_(height)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [N, G, A] of a [N, G, 4] with b [N, A, 4] or [A, 4]; 0 where both are empty."""
    overlap = intersection(a, b)
    union = area(a)[:, :, None] + area(b)[..., None, :] - overlap
    return torch.where(union > 0, overlap / union, 0)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    return 0.5 * (x1 + x2), 0.5 * (y1 + y2), x2 - x1, y2 - y1


class BoxCoder:
    """Deltas between anchors and boxes.

    Args:
        weights: (wx, wy, ww, wh), the factors of the four deltas; (10, 10, 5, 5) gives them unit variance in RoI heads.
        max_log_scale: upper limit of dw / ww and dh / wh when decoding.
        clamp_shrinking: limit them from below as well, at -max_log_scale, as mmdetection does.
    """

    def __init__(
        self,
        weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        max_log_scale: float = MAX_LOG_SCALE,
        clamp_shrinking: bool = False,
    ):
        if len(weights) != 4 or min(weights) <= 0:
            raise ValueError(f"weights={list(weights)}: expected four positive numbers")
        self.weights = tuple(float(w) for w in weights)
        self.log_scales = -max_log_scale if clamp_shrinking else -math.inf, max_log_scale

    def encode(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Deltas [..., 4] that move `anchors` [..., 4] onto `boxes` [..., 4]. Sides below 1e-6 px count as 1e-6."""
        wx, wy, ww, wh = self.weights
        x, y, w, h = _centre_and_size(boxes)
        x_a, y_a, w_a, h_a = _centre_and_size(anchors)
        w, h, w_a, h_a = (side.clamp(min=1e-6) for side in (w, h, w_a, h_a))
        deltas = [wx * (x - x_a) / w_a, wy * (y - y_a) / h_a, ww * torch.log(w / w_a), wh * torch.log(h / h_a)]
        return torch.stack(deltas, dim=-1)

    def decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        """Boxes [..., 4] that `deltas` [..., 4] make of `anchors` [..., 4]: inverse of `encode` up to the limit."""
        wx, wy, ww, wh = self.weights
        dx, dy, dw, dh = deltas.float().unbind(-1)
        x_a, y_a, w_a, h_a = _centre_and_size(anchors)
        x, y = x_a + dx / wx * w_a, y_a + dy / wy * h_a
        half_w = 0.5 * w_a * torch.exp((dw / ww).clamp(*self.log_scales))
        half_h = 0.5 * h_a * torch.exp((dh / wh).clamp(*self.log_scales))
        return torch.stack([x - half_w, y - half_h, x + half_w, y + half_h], dim=-1)


def clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Boxes [N, ..., 4] cut at the borders of their images; image_sizes [N, 2] = (height, width)."""
    limits = image_sizes.to(boxes.dtype).flip(1).repeat(1, 2)  # (w, h, w, h)
    limits = limits.reshape(-1, *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def nms_by_image(
    boxes: Tensor, scores: Tensor, image: Tensor, group: Tensor, threshold: float, images: int, limit: int
) -> tuple[Tensor, Tensor]:
    """Greedy non-maximum suppression within (image, group), the best `limit` survivors of each image.

    Args:
        boxes: [R, 4]. scores: [R]. image: [R] index of the image, 0..images-1.
        group: [R] non-negative; boxes of different groups (levels, classes) do not suppress each other.

    Returns:
        rows [images, limit] into the input, best first, and valid [images, limit]; padding points at row 0.
    """
    if boxes.is_cuda and triton_available():
        from detector.ops.triton_nms import nms_fused

        return nms_fused(boxes, scores, image, group, threshold, images, limit)
    keep = []
    for i in range(images):  # one by one: of too many boxes at once torchvision takes every group apart
        rows = torch.nonzero(image == i)[:, 0]
        keep.append(rows[batched_nms(boxes[rows], scores[rows], group[rows], threshold)])
    kept = torch.cat(keep)
    return group_by_image(kept, image[kept], images, limit)


def nms_like_mmcv(
    boxes: Tensor, scores: Tensor, image: Tensor, group: Tensor, threshold: float, images: int, limit: int
) -> tuple[Tensor, Tensor]:
    """`nms_by_image` to the bit as mmcv does it: the order among equal scores is that of an unstable sort, and groups
    are moved apart in float32, which can turn an IoU at the threshold."""
    keep = []
    for i in range(images if len(boxes) else 0):
        rows = torch.nonzero(image == i)[:, 0]
        rows = rows[scores[rows].sort(descending=True)[1]]
        if len(rows):
            apart = boxes[rows] + (group[rows] * (boxes[rows].max() + 1))[:, None]
            falling = torch.arange(len(rows), 0, -1, dtype=torch.float32, device=boxes.device)
            keep.append(rows[nms(apart, falling, threshold)])
    kept = torch.cat(keep) if keep else image[:0]
    return group_by_image(kept, image[kept], images, limit)


def soft_nms_by_image(
    boxes: Tensor,
    scores: Tensor,
    image: Tensor,
    group: Tensor,
    threshold: float,
    images: int,
    limit: int,
    decay: str = "gaussian",
    min_score: float = 0.0,
    sigma: float = 0.5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Soft-NMS (Bodla et al. 2017, section 3): overlapping boxes lose score instead of disappearing.

    Each box that is taken multiplies the scores of the others in its (image, group) by
        'linear':   1 - IoU, where IoU > threshold
        'gaussian': exp(-IoU^2 / sigma)
    Arguments as `nms_by_image`'s; boxes whose score falls to `min_score` are out. Also returns the new scores [R].
    """
    scores, taken, order = scores.clone(), torch.zeros_like(scores, dtype=torch.bool), []
    for _ in range(limit):
        # the best remaining box of every image, all images at once
        open_scores = torch.where(taken, -1.0, scores)
        best = scores.new_full((images,), -1.0).scatter_reduce(0, image, open_scores, "amax")
        candidates = torch.nonzero((open_scores == best[image]) & (open_scores > min_score))[:, 0]
        if len(candidates) == 0:
            break
        first = torch.full((images,), len(scores), device=scores.device).scatter_reduce(
            0, image[candidates], candidates, "amin"
        )
        chosen = first[first < len(scores)]
        taken[chosen] = True
        order.append(chosen)
        rival = first[image].clamp(max=len(scores) - 1)
        iou = pairwise_iou(boxes[rival][:, None], boxes[:, None])[:, 0, 0]
        factor = torch.exp(-(iou**2) / sigma) if decay == "gaussian" else torch.where(iou > threshold, 1 - iou, 1.0)
        affected = (group[rival] == group) & (first[image] < len(scores)) & ~taken
        scores = torch.where(affected, scores * factor, scores)
    rows = torch.cat(order) if order else image[:0]
    return *group_by_image(rows, image[rows], images, limit), scores


class Survivors(NamedTuple):
    """What suppression leaves of a table [A, B] of boxes, best first, for each of N images."""

    row: Tensor  # [N, D] into the table, 0 in padding
    column: Tensor  # [N, D]
    valid: Tensor  # [N, D] bool
    scores: Tensor  # [N, D], 0 in padding

    def of(self, values: Tensor) -> Tensor:
        """The values [A, B, ...] of the survivors, [N, D, ...]: 0 in padding."""
        picked = values[self.row, self.column]
        return torch.where(self.valid.view(*self.valid.shape, *[1] * (picked.dim() - 2)), picked, 0)


def survivors(
    boxes: Tensor,
    scores: Tensor,
    wanted: Tensor,
    image: Tensor,
    group: Tensor,
    nms: Callable[..., tuple[Tensor, ...]],
    threshold: float,
    images: int,
    limit: int,
) -> Survivors:
    """The best `limit` boxes of each image that suppress each other no longer.

    Args:
        boxes: [A, B, 4], A at least 1. scores: [A, B]. wanted: [A, B] bool, which of them take part.
        image: [A] index of each row's image, 0..images-1. group: [A, B] as in `nms_by_image`.
        nms: `nms_by_image` or another function of this module that is called like it.
    """
    if nms is nms_by_image and boxes.is_cuda and triton_available() and wanted.numel() <= MOST:
        taking_part = torch.where(wanted, image[:, None], images)  # the others are of no image: no need to count them
        flat = scores.flatten(), taking_part.flatten(), group.flatten()
        rows, valid = nms(boxes.flatten(0, 1), *flat, threshold, images, limit)
        row, column = torch.div(rows, wanted.shape[1], rounding_mode="floor"), rows % wanted.shape[1]
        return Survivors(row, column, valid, torch.where(valid, scores[row, column], 0))
    row, column = torch.nonzero(wanted, as_tuple=True)
    if len(row) == 0:  # padding has nothing to point at
        nothing = image.new_zeros(images, limit)
        return Survivors(nothing, nothing, nothing.bool(), scores.new_zeros(images, limit))
    scores = scores[row, column]
    args = (image[row], group[row, column], threshold, images, limit)
    rows, valid, *lowered = nms(boxes[row, column], scores, *args)
    scores = (lowered or [scores])[0][rows]
    return Survivors(row[rows], column[rows], valid, scores * valid)


def group_by_image(rows: Tensor, image: Tensor, images: int, limit: int) -> tuple[Tensor, Tensor]:
    """Lay rows [R] out as [images, limit] in their order, with the valid mask; what exceeds `limit` is dropped, and so
    are rows whose image is `images`."""
    order = torch.argsort(image, stable=True)
    rows, image = rows[order], image[order]
    start = torch.searchsorted(image, torch.arange(images + 1, device=image.device))
    rank = torch.arange(len(rows), device=rows.device) - start[image]
    end = images * limit  # a place for what is dropped, so that their number need not be known
    slot = torch.where((rank < limit) & (image < images), image * limit + rank, end)
    table = rows.new_zeros(end + 1).index_copy(0, slot, rows)[:end]
    valid = torch.zeros(end + 1, dtype=torch.bool, device=rows.device).index_fill(0, slot, True)[:end]
    return table.view(images, limit), valid.view(images, limit)


def take(values: Tensor, index: Tensor) -> Tensor:
    """values [N, P, ...] at index [N, S] along dimension 1: [N, S, ...]."""
    image = torch.arange(values.shape[0], device=values.device)[:, None]
    return values[image, index]


def of_label(values: Tensor, labels: Tensor) -> Tensor:
    """The rows [R, ...] for foreground labels [R] in 1..K of per-class values [R, K, ...]; or of values [R, 1, ...]."""
    if values.shape[1] == 1:
        return values[:, 0]
    return values[torch.arange(len(labels), device=labels.device), (labels - 1).clamp(min=0)]
