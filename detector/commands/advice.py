"""What a data set asks of the settings of a training: anchors, the size of images, the RoIs in the losses, the batch,
the validation set.

Each part looks at the data as the training that is to follow sees them, and gives numbers with its advice.
Dimensions: M objects, L levels, S shapes of anchors at a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from detector.comparison.statistics import draws, match, metrics, resample
from detector.data.annotations import Truth
from detector.rpn import AnchorGenerator

REACHED = 0.5  # IoU from which an anchor is a good start for an object
MOST = 3000  # objects that are looked at
FEW_IMAGES, FEW_OBJECTS = 50, 200
SMALL, LARGE = 16, 64  # px: a tenth of the objects below the one, or nine tenths above the other


# ------------------------------------------------------------------------------------------------------------- anchors


class Anchors(NamedTuple):
    """Sizes of each level and ratios (height / width); the share of the objects that they reach, and the mean IoU."""

    sizes: list[list[float]]
    ratios: list[float]
    reached: float
    iou: float


def best_anchor_iou(boxes: Tensor, sizes: Tensor, anchors: AnchorGenerator) -> Tensor:
    """[M] the largest IoU of each box with any anchor: per shape that is the anchor nearest to the box's centre."""
    best = torch.zeros(len(boxes))
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    for stride, cells in zip(anchors.strides, anchors.cells):
        last = (sizes.flip(1) - 1).div(stride, rounding_mode="floor") * stride
        nearest = ((centre / stride).round() * stride).clamp(min=0).minimum(last)
        for cell in cells:
            placed = torch.cat([nearest, nearest], dim=1) + cell
            low, high = torch.maximum(placed[:, :2], boxes[:, :2]), torch.minimum(placed[:, 2:], boxes[:, 2:])
            shared = (high - low).clamp(min=0).prod(dim=1)
            area = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) + (cell[2:] - cell[:2]).prod()
            best = torch.maximum(best, shared / (area - shared))
    return best


def propose_anchors(
    boxes: Tensor,
    image_sizes: Tensor,
    strides: Sequence[int],
    sizes: Sequence[Sequence[float]],
    ratios: Sequence[float],
) -> tuple[Anchors, Anchors]:
    """The anchors as they are and the best of some others, with as many shapes on each level.

    The others have the ratios and sizes that k-means on IoU finds in the objects (Redmon, Farhadi, "YOLO9000", CVPR
    2017), and the sizes as they are times powers of the square root of 2.

    boxes [M, 4] and image_sizes [M, 2] (height, width): as the network sees them.
    """
    some = torch.linspace(0, len(boxes) - 1, min(len(boxes), MOST)).long()
    boxes, image_sizes = boxes[some], image_sizes[some]
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-3).numpy().astype(float)
    levels = [list(level) for level in (list(sizes) * len(strides) if len(sizes) == 1 else sizes)]

    def measured(level_sizes: list[list[float]], own: list[float]) -> Anchors:
        iou = best_anchor_iou(boxes, image_sizes, AnchorGenerator(strides, level_sizes, own))
        return Anchors(level_sizes, own, float((iou >= REACHED).float().mean()), float(iou.mean()))

    root = np.sqrt(sides.prod(1))
    centres = np.sqrt(k_means(np.stack([root, root], 1), sum(map(len, levels))).prod(1))
    found, at = np.sort(centres).round().clip(1).astype(int).tolist(), 0
    by_data = []
    for level in levels:
        by_data.append(found[at : at + len(level)])
        at += len(level)
    shapes = k_means(sides / root[:, None], len(ratios))
    own_ratios = sorted((shapes[:, 1] / shapes[:, 0]).round(2).tolist())
    scaled = [[[max(1, round(size * 2 ** (step / 2))) for size in level] for level in levels] for step in range(-8, 5)]
    now = measured(levels, list(ratios))
    others = [measured(level_sizes, own) for level_sizes in [by_data, *scaled] for own in (list(ratios), own_ratios)]
    return now, max(others, key=lambda anchors: anchors.iou)


def k_means(shapes: np.ndarray, count: int, rounds: int = 50) -> np.ndarray:
    """Centres [count, 2] of shapes [M, 2] (width, height); how near two are is the IoU of boxes on one centre."""
    order = np.argsort(shapes.prod(1) * 1e6 + shapes[:, 1] / shapes[:, 0], kind="stable")
    centres = shapes[order[((np.arange(count) + 0.5) / count * len(shapes)).astype(int)]].copy()
    nearest = np.full(len(shapes), -1)
    for _ in range(rounds):
        shared = np.minimum(shapes[:, None], centres).prod(2)
        found = (shared / (shapes.prod(1)[:, None] + centres.prod(1) - shared)).argmax(1)
        if (found == nearest).all():
            break
        nearest = found
        for k in range(count):
            if (nearest == k).any():
                centres[k] = np.median(shapes[nearest == k], axis=0)
    return centres


# ------------------------------------------------------------------------------------------------------- size of images


def propose_edge(sides: np.ndarray, image_sizes: np.ndarray, edge: int) -> tuple[int, str] | None:
    """Another length of the images' shorter side and why; None where the objects are of a good size.

    sides [M]: sqrt(area) of the objects as the network sees them, with `edge`. image_sizes [I, 2]: of the files.
    """
    if not len(sides):
        return None
    low, native = float(np.quantile(sides, 0.1)), float(np.median(image_sizes.min(1)))
    if low < SMALL:
        wanted = min(edge * 1.5 * SMALL / low, max(edge, 2 * native), 1600)
        why = f"a tenth of the objects are below {low:.0f} px as the network sees them, and lost between its cells"
    elif low > LARGE:
        wanted = max(edge * 0.75 * LARGE / low, 320)
        why = (
            f"nine tenths of the objects are above {low:.0f} px as the network sees them: smaller images take less time"
        )
    else:
        return None
    wanted = max(32, round(wanted / 32) * 32)
    return (wanted, why) if abs(wanted - edge) >= 0.2 * edge else None


# --------------------------------------------------------------------------------------------------- RoIs in the losses


def propose_rois(objects: float, rois: int, positive_fraction: float, most: int = 512) -> int | None:
    """How many RoIs of an image should enter the losses: `rois` doubled until an image with so many `objects` has a
    place for each among the positives, up to `most`; None where it has it already, or `rois` are as many."""
    wanted = rois
    while wanted < most and objects > int(wanted * positive_fraction):
        wanted = min(2 * wanted, most)
    return wanted if wanted > rois else None


# ---------------------------------------------------------------------------------------------------------------- speed


def span(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


# ------------------------------------------------------------------------------------------------------- validation set


def noise(truth: Truth, count: int = 200, seed: int = 0) -> tuple[float, float, float] | None:
    """AP of a detector of middling quality on this validation set, and the 95 % interval that the choice of its images
    leaves, from `count` bootstrap draws; None without objects.

    It finds every object with a box whose IoU lies anywhere between 0.35 and 1, the better the higher its score, and
    half as many boxes where there is nothing.
    """
    rng = np.random.default_rng(seed)
    kept = np.flatnonzero(~truth.crowd & (truth.boxes[:, 2:] > 0).all(1))
    if not len(kept):
        return None
    iou = rng.uniform(0.35, 1, len(kept))
    boxes = truth.boxes[kept].copy()
    boxes[:, 0] += boxes[:, 2] * (1 - iou) / (1 + iou)  # moved by so much of its width, a box has this IoU
    scores = np.clip(0.6 * iou + rng.uniform(0, 0.4, len(kept)), 0, 1)
    false = rng.choice(len(kept), -(-len(kept) // 2))
    elsewhere = boxes[false] + np.stack([3 * boxes[false][:, 2], 3 * boxes[false][:, 3], *[0 * false] * 2], 1)
    images, ids = truth.image_ids[truth.images_of()[kept]], np.array(truth.category_ids)[truth.labels[kept] - 1]
    rows = [
        *zip(images, ids, boxes, scores),
        *zip(images[false], ids[false], elsewhere, rng.uniform(0.2, 0.8, len(false))),
    ]
    results = [
        {"image_id": int(image), "category_id": int(id_), "bbox": box.tolist(), "score": float(score)}
        for image, id_, box, score in rows
    ]
    matches = match(truth, results)
    value = metrics(resample(matches, areas=(0,)))["AP"][0]
    drawn = metrics(resample(matches, draws(len(truth), count, seed), areas=(0,)))["AP"]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(value), float(low), float(high)


def bracketed(value: Any) -> str:
    """Nested lists of numbers as a command line has them."""
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return f"[{','.join(map(bracketed, value))}]" if isinstance(value, (list, tuple)) else f"{value:g}"
