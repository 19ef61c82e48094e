"""FROC: how many of the objects are found at so many false detections an image (Bunch et al. 1977; LUNA16's form).

A detection counts as right where it found an object at IoU 0.5; the matches are COCO's own. At each rate of RATES the
sensitivity is that of the lowest score with at most so many false detections an image; "mean" is their mean, LUNA16's
score. By series, a rate is of false detections a series, and objects with one track_id in a series are a lesion, found
where any of its slices shows it. Intervals of 95 % are bootstraps (Efron 1979) over images, or over series.

Dimensions: I images or series, D detections, T thresholds.
"""

from __future__ import annotations

import json
import re
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
    annotations: Any, predictions: Any, iou_type: str, content: Mapping[str, Any], limit: int = COCO_LIMITS[-1]
) -> dict[str, Any] | None:
    """Of all categories, by series; None where each image is a series of its own.

    content: the annotation file, whose images may have a `series` and whose objects may have a track_id.
    """
    names = {image["id"]: series_of(image) for image in content["images"]}
    series = sorted({*names.values()})
    if len(series) == len(names):
        return None
    checked = check_annotations(annotations, iou_type)
    found = check_predictions(predictions, checked, iou_type)
    kept = kept_matches(annotations, predictions, iou_type, limit)
    index = {name: i for i, name in enumerate(series)}
    place = np.array([index[names[i]] for i in kept.image_ids.tolist()])
    lesions = lesions_of(content, names)
    if lesions is None:
        mine = kept.true | kept.false
        objects = np.bincount(place, kept.objects.sum(1), len(series)).astype(int)
        known = curve(place[kept.image[mine]], kept.score[mine], kept.true[mine], objects)
    else:
        known = _by_lesion(kept, place, series, lesions, content, found, iou_type)
    return {"series": len(series), "all": known}


def series_of(image: Mapping[str, Any]) -> str:
    """The series of an image record: its field `series`, its video, the file whose page it is, or the folder of a DICOM
    file; else itself."""
    for key in ("series", "video_id"):
        if image.get(key) is not None:
            return f"{key} {image[key]}"
    name = str(image["file_name"])
    if re.search(r"#page=\d+$", name):
        return name.rpartition("#page=")[0]
    return str(Path(name).parent) if Path(name).suffix.lower() in (".dcm", ".dicom") else name


def lesions_of(content: Mapping[str, Any], names: Mapping[Any, str]) -> dict[tuple[str, Any], list[dict]] | None:
    """The annotations of each lesion: those of one series and track_id; None where no object has a track_id."""
    objects = [one for one in content["annotations"] if not one.get("iscrowd")]
    if not any(one.get("track_id") is not None for one in objects):
        return None
    lesions: dict[tuple[str, Any], list[dict]] = {}
    for one in objects:
        track = one.get("track_id")
        key = names[one["image_id"]], ("alone", one["id"]) if track is None else track
        lesions.setdefault(key, []).append(one)
    return lesions


def _by_lesion(kept, place, series, lesions, content, found, iou_type) -> dict[str, Any]:
    """A lesion counts once, at the score of the best detection that found any of its slices."""
    from pycocotools import mask as rle_tools

    best: dict[tuple[str, Any], float] = {}
    by_image: dict[Any, list[dict]] = {}
    for one in found:
        by_image.setdefault(one["image_id"], []).append(one)
    for key, slices in lesions.items():
        for one in slices:
            near = [r for r in by_image.get(one["image_id"], []) if r["category_id"] == one["category_id"]]
            if not near:
                continue
            iou = rle_tools.iou([r["bbox"] for r in near], [one["bbox"]], [0])[:, 0]
            scores = [r["score"] for r, value in zip(near, iou) if value >= 0.5]
            if scores:
                best[key] = max(best.get(key, 0.0), max(scores))
    index = {name: i for i, name in enumerate(series)}
    wrong = kept.false
    units = np.concatenate([place[kept.image[wrong]], [index[name] for name, _ in best]]).astype(int)
    scores = np.concatenate([kept.score[wrong], list(best.values())])
    true = np.concatenate([np.zeros(wrong.sum(), bool), np.ones(len(best), bool)])
    objects = np.bincount([index[name] for name, _ in lesions], minlength=len(series))
    return curve(units, scores, true, objects)


def write_froc(
    truth: Truth, results: list[dict], iou_type: str, limit: int, files: Sequence[Path], folder: Path
) -> str:
    """Measure, write froc.json into the folder, and return the tables. files: the annotation files; a single one tells
    what the series are."""
    numbers = froc(kept_matches(truth, results, iou_type, limit))
    text, known = froc_table(numbers), {"iou_type": iou_type, "by_image": numbers}
    if len(files) == 1:
        content = json.loads(Path(files[0]).read_text(encoding="utf-8-sig"))
        if series := froc_by_series(truth, results, iou_type, content, limit):
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
