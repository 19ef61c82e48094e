"""AP by how hard an object is, as KITTI's benchmark has it (Geiger et al. 2012), and by height and distance.

KITTI's classes: easy is at least 40 px high, wholly visible, truncated by up to 15 %; moderate 25 px, partly occluded,
30 %; hard 25 px, largely occluded, 50 %. What is harder than a class is neither right nor wrong in it, and so are
detections lower than its least height that found nothing. AP is the mean of the precision at 40 recalls, 1/40 to 1
(Simonelli et al. 2019), at IoU 0.7 for cars and 0.5 for others.

By height and distance only truth is put into classes. AP by height leaves wrong detections of other heights out. A
wrong detection has no distance, so by distance it is the recall that is given, of all detections.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from detector.ops.checks import ConfigError

RECALLS = np.linspace(1 / 40, 1, 40)
STRICT = {"Car": 0.7, "car": 0.7}  # IoU from which a detection has found its object; others: 0.5
USUAL_IOU = 0.5
HEIGHTS = ((0, 25), (25, 40), (40, 80), (80, 1e5))  # px
DISTANCES = ((0, 20), (20, 40), (40, 60), (60, 1e5))  # m


class Kind(NamedTuple):
    """A class of objects: which truth counts, and how high a detection must be to count as wrong (px, from, to)."""

    name: str
    counts: Callable[[Mapping[str, Any]], bool]
    heights: tuple[float, float] = (0, 1e9)


def _kitti(name: str, height: float, occluded: int, truncated: float) -> Kind:
    def counts(one: Mapping[str, Any]) -> bool:
        return one["bbox"][3] >= height and one["occluded"] <= occluded and one["truncated"] <= truncated

    return Kind(name, counts, (height, 1e9))


DIFFICULTIES = (_kitti("easy", 40, 0, 0.15), _kitti("moderate", 25, 1, 0.30), _kitti("hard", 25, 2, 0.50))


def by_difficulty(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{category: {"IoU", "easy", "moderate", "hard", "height": {range: AP}, "distance": {range: recall}}}; -1 where
    there is no such object. truth: COCO with `occluded` and `truncated` of objects, and perhaps `distance` (m).

    Raises ConfigError for truth that does not say how hard its objects are.
    """
    objects = [one for one in truth["annotations"] if not one.get("iscrowd")]
    lacks = [key for key in ("occluded", "truncated") if not all(key in one for one in objects)]
    if lacks or not objects:
        raise ConfigError(
            f"annotations: objects have no {' and no '.join(lacks or ['records'])}: "
            "detector convert kitti and bdd100k write them"
        )
    found: dict[str, dict[str, Any]] = {}
    for category in truth["categories"]:
        iou = STRICT.get(category["name"], USUAL_IOU)
        measure = _Measure(truth, results, category["id"], iou)
        row: dict[str, Any] = {"IoU": iou, **{kind.name: measure(kind)[0] for kind in DIFFICULTIES}}
        row["height"] = {_range(span): measure(_height(span))[0] for span in HEIGHTS}
        if any("distance" in one for one in objects):
            row["distance"] = {_range(span): measure(_distance(span))[1] for span in DISTANCES}
        found[category["name"]] = row
    return found


def _range(span: tuple[float, float]) -> str:
    return f"{span[0]:g}-{span[1]:g}" if span[1] < 1e5 else f"{span[0]:g}+"


def _height(span: tuple[float, float]) -> Kind:
    return Kind(_range(span), lambda one: span[0] <= one["bbox"][3] < span[1], span)


def _distance(span: tuple[float, float]) -> Kind:
    return Kind(_range(span), lambda one: span[0] <= one.get("distance", -1) < span[1])


class _Measure:
    """(AP, recall) of one category in a class of objects, on COCO's matching: areas stand for what counts."""

    def __init__(self, truth, results, category: int, iou: float):
        self.images = [{"id": image["id"]} for image in truth["images"]]
        self.truth = [one for one in truth["annotations"] if one["category_id"] == category]
        self.results = [one for one in results if one["category_id"] == category]
        self.category, self.iou = category, iou

    def __call__(self, kind: Kind) -> tuple[float, float]:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if not any(not one.get("iscrowd") and kind.counts(one) for one in self.truth):
            return -1.0, -1.0
        given, low, high = [], *kind.heights
        for one in self.truth:
            counts = not one.get("iscrowd") and kind.counts(one)
            known = {key: one[key] for key in ("id", "image_id", "category_id", "bbox")}
            given.append(known | {"iscrowd": int(bool(one.get("iscrowd"))), "area": 1.0 if counts else 0.0})
        seen = []
        for number, one in enumerate(self.results, 1):
            height = one["bbox"][3]
            known = {key: one[key] for key in ("image_id", "category_id", "bbox", "score")}
            seen.append(known | {"id": number, "iscrowd": 0, "area": 1.0 if low <= height < high else 0.0})
        with contextlib.redirect_stdout(io.StringIO()):
            sides = []
            for annotations in (given, seen):
                side = COCO()
                side.dataset = {
                    "images": self.images,
                    "annotations": annotations,
                    "categories": [{"id": self.category}],
                }
                side.createIndex()
                sides.append(side)
            evaluator = COCOeval(*sides, "bbox")
            settings = evaluator.params
            settings.iouThrs, settings.recThrs = np.array([self.iou]), RECALLS
            settings.areaRng, settings.areaRngLbl, settings.maxDets = [[0.5, 2.0]], ["all"], [1000]
            evaluator.evaluate()
            evaluator.accumulate()
        precision = evaluator.eval["precision"][0, :, 0, 0, 0]
        return float(precision.mean()), float(evaluator.eval["recall"][0, 0, 0, 0])
