"""Average precision as Pascal VOC measures it (Everingham et al. 2010): the area since VOC2010, 11 points in VOC2007.

Detections of a class, best first, go to the object of their image that they overlap most. It is a hit if IoU >= 0.5 and
the object has not been hit before, and counts as nothing if the object is difficult (`iscrowd`); all else is an error.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from pycocotools import mask as box_tools

from detector.data.annotations import Truth
from detector.evaluation.coco import check_annotations, check_predictions, for_backend


def voc_metrics(
    annotations: str | Path | dict | Truth,
    predictions: str | Path | list[dict],
    per_class: bool = False,
    threshold: float = 0.5,
) -> dict:
    """VOC's AP of boxes as fractions of 1; -1 for a class without objects, which the mean leaves out.

    annotations, predictions: as coco_metrics takes them; `iscrowd: 1` marks difficult objects.

    Returns {"AP50": area under the curve, "AP50_11_points": mean of 11 points}, named after `threshold`, and with
    per_class "per_class": {category name: the same}.
    """
    checked = check_annotations(annotations)
    truth, results = for_backend(checked, check_predictions(predictions, checked))
    name = f"AP{round(100 * threshold)}"
    objects, found = defaultdict(list), defaultdict(list)
    for entry in truth["annotations"]:
        objects[entry["category_id"], entry["image_id"]].append(entry)
    for entry in results:
        found[entry["category_id"]].append(entry)
    classes = {}
    for category in truth["categories"]:
        own = {image: entries for (id_, image), entries in objects.items() if id_ == category["id"]}
        recall, precision = curve(own, found[category["id"]], threshold)
        numbers = (area(recall, precision), eleven_points(recall, precision)) if recall is not None else (-1.0, -1.0)
        classes[category["name"]] = {name: numbers[0], f"{name}_11_points": numbers[1]}
    measured = [numbers for numbers in classes.values() if numbers[name] >= 0]
    metrics = {
        key: float(np.mean([n[key] for n in measured])) if measured else -1.0 for key in (name, f"{name}_11_points")
    }
    return metrics | ({"per_class": classes} if per_class else {})


def curve(
    objects: dict[int, list[dict]], results: list[dict], threshold: float
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Recall and precision after each detection of one class, those that count for nothing left out; None without
    objects. objects: by image id."""
    total = sum(not entry["iscrowd"] for entries in objects.values() for entry in entries)
    if not total:
        return None, None
    hit: set[int] = set()
    verdicts = []
    for result in sorted(results, key=lambda entry: -entry["score"]):
        rivals = objects.get(result["image_id"], [])
        boxes = np.array([entry["bbox"] for entry in rivals], float).reshape(-1, 4)
        overlaps = (
            box_tools.iou(np.array([result["bbox"]], float), boxes, [0] * len(rivals)) if rivals else np.zeros((1, 0))
        )
        best = int(overlaps[0].argmax()) if rivals else -1
        if best < 0 or overlaps[0, best] < threshold:
            verdicts.append(False)
        elif not rivals[best]["iscrowd"]:
            verdicts.append(rivals[best]["id"] not in hit)
            hit.add(rivals[best]["id"])
    hits = np.cumsum(verdicts)
    return hits / total, hits / np.arange(1, len(verdicts) + 1)


def area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the curve, in which precision is the best at this recall or a higher one."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0) * envelope))


def eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean over recall 0, 0.1, ..., 1 of the best precision at this recall or a higher one."""
    return float(np.mean([precision[recall >= t].max(initial=0) for t in np.arange(11) / 10]))
