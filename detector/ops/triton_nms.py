"""Greedy non-maximum suppression on the GPU, of all images and groups at once, without the host waiting for it.

A program handles one group, best box first, in blocks of BLOCK boxes: those that a kept box of an earlier block
overlaps are out; within the block the rule "kept unless a better kept box overlaps it" is applied to all boxes until
nothing changes. That is the greedy result: after t rounds the first t boxes are settled, for each hangs on better ones.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64
GROUPS = 1 << 32  # of an image, at most


@triton.jit
def _corners(boxes, row, there):
    box = boxes + row * 4
    x1 = tl.load(box, mask=there, other=0)
    y1 = tl.load(box + 1, mask=there, other=0)
    x2 = tl.load(box + 2, mask=there, other=0)
    y2 = tl.load(box + 3, mask=there, other=0)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit
def _overlap(a, b, threshold):
    """Whether the IoU of boxes a [BLOCK] and b [BLOCK] is above the threshold, [BLOCK, BLOCK]."""
    ax1, ay1, ax2, ay2, area_a = a
    bx1, by1, bx2, by2, area_b = b
    width = tl.minimum(ax2[:, None], bx2[None, :]) - tl.maximum(ax1[:, None], bx1[None, :])
    height = tl.minimum(ay2[:, None], by2[None, :]) - tl.maximum(ay1[:, None], by1[None, :])
    common = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    return tl.div_rn(common, area_a[:, None] + area_b[None, :] - common) > threshold


@triton.jit
def _any(pairs, kept):
    """For each column of `pairs`: does a row that is kept have it? [BLOCK] int32."""
    return tl.max(tl.where(pairs & (kept != 0)[:, None], 1, 0), axis=0)


@triton.jit
def _suppress(boxes, key, ends, keep, dropped, threshold, BLOCK: tl.constexpr):
    first = tl.program_id(0)
    group = tl.load(key + first)
    before = tl.load(key + first - 1, mask=first > 0, other=-1)
    if (group != before) & (group < dropped):  # the others have no row of their own to begin at
        last = tl.load(ends + first).to(tl.int32)
        order = tl.arange(0, BLOCK)
        for start in range(first, last, BLOCK):
            row = start + order
            there = row < last
            box = _corners(boxes, row, there)
            out = tl.zeros((BLOCK,), tl.int32)
            for earlier in range(first, start, BLOCK):
                better = _corners(boxes, earlier + order, order >= 0)
                kept = tl.load(keep + earlier + order, volatile=True).to(tl.int32)
                out = tl.maximum(out, _any(_overlap(better, box, threshold), kept))
            alive = there & (out == 0)
            pairs = _overlap(box, box, threshold) & (order[:, None] < order[None, :])
            kept = alive.to(tl.int32)
            changed = tl.max(kept, axis=0)
            while changed > 0:
                now = tl.where(alive & (_any(pairs, kept) == 0), 1, 0)
                changed = tl.max(tl.abs(now - kept), axis=0)
                kept = now
            tl.store(keep + row, kept.to(tl.int8), mask=there)
            tl.debug_barrier()  # other threads of this program read it


def nms_fused(
    boxes: Tensor, scores: Tensor, image: Tensor, group: Tensor, threshold: float, images: int, limit: int
) -> tuple[Tensor, Tensor]:
    """What `ops.boxes.nms_by_image` gives, to the bit of its comparisons, for boxes [R, 4] on a GPU.

    Rows whose image is `images` take no part. Among equal scores the earlier row is the better one.
    """
    from detector.ops.boxes import group_by_image

    order = scores.argsort(descending=True, stable=True)
    image = image[order]
    key, by_group = (image * GROUPS + group[order]).sort(stable=True)
    keep = torch.zeros(len(boxes), dtype=torch.int8, device=boxes.device)
    if len(boxes):
        _suppress[(len(boxes),)](
            boxes[order[by_group]].float().contiguous(),
            key,
            torch.searchsorted(key, key, right=True),
            keep,
            images * GROUPS,
            below(threshold),
            BLOCK=BLOCK,
            num_warps=8,
            enable_fp_fusion=False,  # the CPU's roundings
        )
    kept = torch.empty_like(keep).scatter_(0, by_group, keep)
    return group_by_image(order, torch.where(kept > 0, image, images), images, limit)


def below(threshold: float) -> float:
    """The largest float32 that is not above it: a float32 is above the one as it is above the other."""
    nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-math.inf)))
