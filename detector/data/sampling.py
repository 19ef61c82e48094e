"""How often each image is drawn in training: as often as every other, or by the categories that it holds.

A number for each image, of which only the proportions count: an epoch is as many samples as there are images whatever
the rule, so that lengths of training mean the same.

Dimensions: I images, K categories.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from detector.data.annotations import Annotations, ranges

log = logging.getLogger(__name__)

PART = 50_000  # images of which a table by categories is held at a time
RULES = ("uniform", "repeat_factor", "class_balanced")


def image_weights(
    found: Annotations, rows: np.ndarray, rule: str = "uniform", threshold: float = 0.001
) -> np.ndarray | None:
    """Weights [I] of the images `rows` of a data set; None where all are equal.

    repeat_factor: Gupta, Dollár, Girshick, "LVIS", CVPR 2019, appendix B.2. f(c): the share of the images that hold
    category c; r(c) = max(1, sqrt(threshold / f(c))); an image has the largest r(c) of its categories, 1 without any.
    class_balanced: a category drawn evenly among those that occur, then an image evenly among those that hold it.
    Images without objects keep their share. Crowd regions do not count.

    Raises ValueError for an unknown rule or a threshold that is no share.
    """
    if rule not in RULES:
        raise ValueError(f"data.sampling = {rule!r}: must be one of {', '.join(RULES)}")
    if not 0 < threshold <= 1:
        raise ValueError(f"data.repeat_threshold = {threshold}: must be a share of the images, above 0 and up to 1")
    if rule == "uniform":
        return None
    images_with = sum(holds.sum(0) for holds in presence(found, rows))
    if rule == "repeat_factor":
        share = np.maximum(images_with, 1) / len(rows)
        factors = np.maximum(1, np.sqrt(threshold / share))
        parts = [np.where(holds, factors, 1).max(axis=1, initial=1) for holds in presence(found, rows)]
        weights = np.concatenate(parts)
        if (weights == 1).all():
            log.warning(
                "data.sampling = repeat_factor changes nothing: every category is in at least %.2g of the images; "
                "data.repeat_threshold = %.2g must be larger than the share of a category to have it drawn more often",
                *(share[images_with > 0].min(initial=1), threshold),
            )
            return None
        return weights
    weights = np.concatenate([(holds / np.maximum(images_with, 1)).sum(1) for holds in presence(found, rows)])
    empty = np.concatenate([~holds.any(1) for holds in presence(found, rows)])
    if not empty.all():
        weights *= (~empty).sum() / weights.sum()  # the mean over images with objects is 1
    weights[empty] = 1
    return weights


def presence(found: Annotations, rows: np.ndarray) -> Iterator[np.ndarray]:
    """[I, K] bool: which of the images `rows` hold an object of which category; some images at a time."""
    for start in range(0, len(rows), PART):
        some = rows[start : start + PART]
        objects = ranges(found.object_starts, some)
        images_of = np.repeat(np.arange(len(some)), np.diff(found.object_starts)[some])
        holds = np.zeros((len(some), len(found.categories)), bool)
        counted = ~found.crowd[objects]
        holds[images_of[counted], found.labels[objects][counted] - 1] = True
        yield holds


def draw_epoch(weights: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(images [I], which copy of its image each one is [I]) of an epoch, shuffled.

    Systematic sampling: an image of weight w, the mean being 1, occurs floor(w) or ceil(w) times, w on average.
    """
    order = rng.permutation(len(weights))
    ends = np.cumsum(weights[order] / weights.sum() * len(weights))
    ends[-1] = len(weights)  # but for rounding
    counts = np.diff(np.floor(ends + rng.random()), prepend=0).astype(np.int64)
    images = np.repeat(order, counts)
    copies = np.arange(len(images)) - np.repeat(np.cumsum(counts) - counts, counts)
    shuffled = rng.permutation(len(images))
    return images[shuffled], copies[shuffled]
