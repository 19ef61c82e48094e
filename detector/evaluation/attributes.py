"""How well attributes are told, of the objects that are found.

An object is found by a detection of its class with an IoU of at least 0.5, matched as COCO does: the best detection
first, each to the free object that it overlaps most, and of what is known of that object

    accuracy    the share of which the likelier is right: yes or no, or the likeliest word; mean over the attributes
    AP          average precision, sum over positives of the precision at their probability / their number, of ranking
                the found objects by the probability of an attribute, or of each of its words; mean over all of these
                that have positives and negatives
    found       the share of the objects of which something is known that are found: the others count in neither

Dimensions: M objects, A attributes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_tools

from detector.data.annotations import Truth

IOU = 0.5


def attribute_metrics(truth: Truth, results: Sequence[dict], per_attribute: bool = False) -> dict[str, Any]:
    """{"AP", "accuracy", "found"} as fractions of 1, -1 where there is nothing to measure.

    results: COCO results with `attributes`, as heads.AttributeHead writes them. per_attribute: adds "per_attribute",
    {name: {"objects": how many found ones it is known of, "accuracy", and of what is true or false "positives", "AP"}},
    and the same of each word as "name=word".
    """
    rows, found = matched(truth, results)
    codes = truth.attributes[rows]
    table: dict[str, dict[str, Any]] = {}
    for (name, *words), code in zip(truth.attribute_groups, codes.T):
        known = np.flatnonzero(code >= 0)
        said = [results[found[i]]["attributes"][name] for i in known]
        if not words:
            scores, right = np.array(said, float), code[known] == 1
            table[name] = row(right, scores) | {"accuracy": share((scores >= 0.5) == right)}
            continue
        scores = np.array([[one[word] for word in words] for one in said], float).reshape(-1, len(words))
        likeliest = scores.argmax(axis=1)
        table[name] = {"objects": len(known), "accuracy": share(likeliest == code[known])}
        for index, word in enumerate(words):
            right = code[known] == index
            table[f"{name}={word}"] = row(right, scores[:, index]) | {"accuracy": share((likeliest == index) == right)}
    of_groups = [table[name]["accuracy"] for name, *_ in truth.attribute_groups]
    known = (truth.attributes >= 0).any(axis=1) & ~truth.crowd
    metrics: dict[str, Any] = {
        "AP": mean([one["AP"] for one in table.values() if 0 < one.get("positives", 0) < one["objects"]]),
        "accuracy": mean([value for value in of_groups if value >= 0]),
        "found": float(len(np.intersect1d(rows, np.flatnonzero(known))) / known.sum()) if known.any() else -1.0,
    }
    return metrics | ({"per_attribute": table} if per_attribute else {})


def row(right: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    return {"objects": len(right), "positives": int(right.sum()), "AP": average_precision(right, scores)}


def average_precision(right: np.ndarray, scores: np.ndarray) -> float:
    """Mean over the positives of the precision among all that score at least as high; -1 without positives."""
    if not right.any():
        return -1.0
    order = np.argsort(-scores, kind="stable")
    right, scores = right[order], scores[order]
    last = np.searchsorted(-scores, -scores, side="right")  # how many score at least as high
    return float((np.cumsum(right)[last - 1] / last)[right].mean())


def share(right: np.ndarray) -> float:
    return float(right.mean()) if len(right) else -1.0


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else -1.0


def matched(truth: Truth, results: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the objects that are found, and for each the index of its result."""
    of_image: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, entry in enumerate(results):
        of_image[entry["image_id"], entry["category_id"]].append(index)
    rows, found = [], []
    images, ids = truth.image_ids[truth.images_of()], np.array(truth.category_ids, np.int64)[truth.labels - 1]
    objects: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in np.flatnonzero(~truth.crowd):
        objects[int(images[number]), int(ids[number])].append(int(number))
    for key in objects.keys() & of_image.keys():
        there = objects[key]
        candidates = sorted(of_image[key], key=lambda index: -results[index]["score"])
        boxes = np.array([results[index]["bbox"] for index in candidates], float)
        ious = mask_tools.iou(boxes, truth.boxes[there].astype(float), [0] * len(there))
        for index, overlaps in zip(candidates, ious):
            best = int(overlaps.argmax())
            if overlaps[best] >= IOU:
                rows.append(there[best])
                found.append(index)
                ious[:, best] = -1  # taken
    return np.array(rows, np.int64), np.array(found, np.int64)
