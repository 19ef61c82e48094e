"""FROC: how many of the objects are found at so many false detections an image (Bunch et al. 1977; LUNA16's form).

A detection counts as right where it found an object at IoU 0.5; the matches are COCO's own. At each rate of RATES the
sensitivity is that of the lowest score with at most so many false detections an image; "mean" is their mean, LUNA16's
score. By series, a rate is of false detections a series, and objects with one track_id in a series are a lesion, found
where any of its slices shows it. Intervals of 95 % are bootstraps (Efron 1979) over images, or over series.

Dimensions: I images or series, D detections, T thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detector.checkpoint import write_json
from detector.data.annotations import Truth
from detector.evaluation.coco import check_annotations, check_predictions
from detector.evaluation.operating_point import Kept, kept_matches
from detector.evaluation.tables import percent, table
from detector.settings import COCO_LIMITS

RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false detections an image
SAMPLES = 1000
FROC = "froc.json"


def froc(kept: Kept, samples: int = SAMPLES, seed: int = 0) -> dict[str, Any]:
    """{"images", "all": {"objects", "sensitivity": {rate: [value, low, high]}, "mean": [value, low, high]}}, and those
    of each category that has objects, by its name."""
    groups = {"all": np.arange(len(kept.categories))}
    groups |= {name: np.array([k]) for k, name in enumerate(kept.categories) if kept.objects[:, k].sum()}
    known: dict[str, Any] = {"images": len(kept.image_ids)}
    for name, columns in groups.items():
        mine = np.isin(kept.category, columns) & (kept.true | kept.false)
        objects = kept.objects[:, columns].sum(1)
        known[name] = curve(kept.image[mine], kept.score[mine], kept.true[mine], objects, samples, seed)
    return known


def curve(
    unit: np.ndarray, score: np.ndarray, true: np.ndarray, objects: np.ndarray, samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """Of detections [D] in units [I] (images, series), of which each has `objects` [I]."""
    order = np.argsort(-score, kind="stable")
    unit, score, true = unit[order], score[order], true[order]
    last = np.append(score[1:] != score[:-1], True) if len(score) else np.zeros(0, bool)  # equal scores come together

    def at(weights: np.ndarray) -> np.ndarray:
        """Sensitivities [RATES] where unit i was drawn weights[i] times."""
        mine, total = weights[unit], max((weights * objects).sum(), 1)
        right, wrong = np.cumsum(mine * true)[last], np.cumsum(mine * ~true)[last]
        right, wrong = np.append(0, right), np.append(0, wrong)
        allowed = np.searchsorted(wrong, np.array(RATES) * weights.sum() + 1e-9, side="right") - 1
        return right[allowed] / total

    values, random = at(np.ones(len(objects), int)), np.random.default_rng(seed)
    units = len(objects)
    drawn = np.array([at(np.bincount(random.integers(0, units, units), minlength=units)) for _ in range(samples)])
    drawn, values = np.column_stack([drawn, drawn.mean(1)]), np.append(values, values.mean())
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    found = [[round(float(v), 5) for v in triple] for triple in zip(values, low, high)]
    sensitivity = {f"{rate:g}": triple for rate, triple in zip(RATES, found)}
    return {"objects": int(objects.sum()), "sensitivity": sensitivity, "mean": found[-1]}


def froc_by_series(
    annotations: Any, predictions: Any, iou_type: str, limit: int = COCO_LIMITS[-1]
) -> dict[str, Any] | None:
    """Of all categories, by series: {"series", "all": as of `froc`}; None where each image is a series of its own.

    Where objects have a track_id, those of one series and track are a lesion; crowd regions are none.

    annotations, predictions: COCO's, as paths, loaded or a Truth. limit: detections of an image that count. Raises
    ValueError where either cannot be what iou_type compares.
    """
    truth = check_annotations(annotations, iou_type)
    alone = -1 - np.arange(len(truth))
    names, unit = np.unique(np.where(truth.series < 0, alone, truth.series), return_inverse=True)
    if len(names) == len(truth):
        return None
    kept = kept_matches(truth, predictions, iou_type, limit)
    rank = np.argsort(truth.image_ids)
    place = unit[rank[np.searchsorted(truth.image_ids, kept.image_ids, sorter=rank)]]
    if (truth.tracks[~truth.crowd] >= 0).any():
        known = _by_lesion(kept, place, truth, unit, check_predictions(predictions, truth, iou_type))
    else:
        mine = kept.true | kept.false
        objects = np.bincount(place, kept.objects.sum(1), len(names)).astype(int)
        known = curve(place[kept.image[mine]], kept.score[mine], kept.true[mine], objects)
    return {"series": len(names), "all": known}


def _by_lesion(kept: Kept, place: np.ndarray, truth: Truth, unit: np.ndarray, found: list[dict]) -> dict[str, Any]:
    """A lesion counts once, at the score of the best detection that found any of its slices.

    place: the series of each of the kept images, unit: of those of the truth.
    """
    from pycocotools import mask as rle_tools

    by_place: dict[tuple[int, int], list[dict]] = {}
    for one in found:
        by_place.setdefault((one["image_id"], one["category_id"]), []).append(one)
    objects = np.flatnonzero(~truth.crowd)
    image, track = truth.images_of()[objects], truth.tracks[objects]
    keys = np.stack([unit[image], np.where(track < 0, -1 - objects, track)], axis=1)
    lesions, lesion = np.unique(keys, axis=0, return_inverse=True)
    lesion = lesion.ravel()  # numpy 2.0 kept the axis
    best = np.full(len(lesions), -np.inf)
    category_ids = np.array(truth.category_ids)[truth.labels[objects] - 1].tolist()
    boxes = truth.boxes[objects].tolist()
    for n, (image_id, category_id) in enumerate(zip(truth.image_ids[image].tolist(), category_ids)):
        if near := by_place.get((image_id, category_id)):
            iou = rle_tools.iou([one["bbox"] for one in near], [boxes[n]], [0])[:, 0]
            scores = [one["score"] for one, value in zip(near, iou) if value >= 0.5]
            best[lesion[n]] = max([best[lesion[n]], *scores])
    right, wrong = np.isfinite(best), kept.false
    units = np.concatenate([place[kept.image[wrong]], lesions[right, 0]]).astype(int)
    scores = np.concatenate([kept.score[wrong], best[right]])
    true = np.arange(len(units)) >= wrong.sum()
    return curve(units, scores, true, np.bincount(lesions[:, 0], minlength=unit.max() + 1))


def write_froc(truth: Truth, results: list[dict], iou_type: str, limit: int, folder: Path) -> str:
    """Measure, write froc.json into the folder, and return the tables."""
    numbers = froc(kept_matches(truth, results, iou_type, limit))
    text, known = froc_table(numbers), {"iou_type": iou_type, "by_image": numbers}
    if series := froc_by_series(truth, results, iou_type, limit):
        known["by_series"] = series
        text += f"\n\n{froc_table(series)}"
    write_json(folder / FROC, known, indent=1)
    return text


def froc_table(numbers: Mapping[str, Any], shown: int = 20) -> str:
    """Sensitivities in percent, with the interval of the mean."""
    groups = {name: values for name, values in numbers.items() if isinstance(values, Mapping)}
    rows: list[Sequence[str]] = []
    for name, values in [*groups.items()][: shown + 1]:
        mean, low, high = values["mean"]
        cells = [percent(value[0]) for value in values["sensitivity"].values()]
        rows.append([name, *cells, percent(mean), f"{percent(low)} to {percent(high)}"])
    unit = "series" if "series" in numbers else "image"
    heads = [f"{rate:g}" if rate >= 1 else f"1/{round(1 / rate)}" for rate in RATES]
    return f"sensitivity at false detections a{'n' * (unit == 'image')} {unit}\n" + table(
        ["", *heads, "mean", "95 %"], rows
    )
