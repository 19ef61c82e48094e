"""From which score on detections are shown: read off COCO's own matches, and how sure that is.

A detection counts as right where it found an object at IoU 0.5, one of all sizes. Over all classes, and for each, the
counts of right and wrong detections of at least each score of SCORES give

    precision = right / (right + wrong),  recall = right / objects,  F1 = 2 right / (objects + right + wrong)

and the operating point is the score of the best F1, or the one that reaches a wished precision with the most recall, or
a wished recall with the most precision. Intervals are of 95 %, from bootstrap draws of the images (Efron 1979): of the
score, what each draw would choose; of the others, what each draw has at the chosen score.

Dimensions: I images, D detections, K classes, S scores, B draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from detector.evaluation.coco import check_annotations, check_predictions, for_backend
from detector.evaluation.tables import TITLES
from detector.ops.checks import ConfigError
from detector.settings import COCO_LIMITS, LVIS_LIMIT

OPERATING_POINT = "operating_point.json"  # beside the results of `detector eval`
IOU = 0.5
SCORES = np.linspace(0, 1, 201)
SAMPLES = 500
FEW_OBJECTS = 20  # a class with fewer has no threshold of its own
BEST, PER_CLASS = "best", "per_class"
NUMBERS = ("f1", "precision", "recall")


class Kept(NamedTuple):
    """The matches that evaluation kept at IoU 0.5; detections in no order."""

    image_ids: np.ndarray  # [I], increasing
    categories: list[str]  # K names
    image: np.ndarray  # [D] index of the image
    category: np.ndarray  # [D] index of the category
    score: np.ndarray  # [D]
    true: np.ndarray  # [D] bool: found an object
    false: np.ndarray  # [D] bool: found none. Neither: does not count (crowd)
    objects: np.ndarray  # [I, K] number of objects that count


def kept_matches(annotations, predictions, iou_type: str = "bbox", limit: int = COCO_LIMITS[-1]) -> Kept:
    """What COCO's evaluation matched, of LVIS's data LVIS's. Arguments as of coco_metrics; limit: detections of a
    category in an image that count."""
    from hotcoco import COCO, COCOeval, LVISeval, LVISResults

    checked = check_annotations(annotations, iou_type)
    found = check_predictions(predictions, checked, iou_type)
    truth, results = for_backend(checked, found, iou_type, rescore=False)  # objects are shown by their boxes' scores
    ground_truth = COCO(truth)
    if checked.federated:
        evaluator = LVISeval(ground_truth, LVISResults(ground_truth, results, LVIS_LIMIT), iou_type)
    else:
        evaluator = COCOeval(ground_truth, ground_truth.load_res(results), iou_type)
        evaluator.params.maxDets = [limit]
    settings = evaluator.params
    settings.iouThrs, settings.areaRng, settings.areaRngLbl = [IOU], [[0, 1e10]], ["all"]
    evaluator.evaluate()
    objects = np.zeros((len(checked), len(checked.categories)), np.int64)
    columns: list[list[np.ndarray]] = [[np.zeros(0)] for _ in range(5)]
    for entry in evaluator.eval_imgs:
        if entry is None:
            continue
        place = entry["image_id"] - 1, entry["category_id"] - 1  # for_backend numbers them from 1
        objects[place] = len(entry["gtIgnore"]) - np.count_nonzero(entry["gtIgnore"])
        scores = np.asarray(entry["dtScores"])
        found, ignored = (np.asarray(entry[key]).reshape(-1)[: len(scores)] > 0 for key in ("dtMatches", "dtIgnore"))
        values = *(np.full(len(scores), index) for index in place), scores, found & ~ignored, ~found & ~ignored
        for column, value in zip(columns, values):
            column.append(value)
    image, category, score, true, false = map(np.concatenate, columns)
    return Kept(
        np.sort(checked.image_ids),
        checked.categories,
        image.astype(np.int64),
        category.astype(np.int64),
        score,
        true.astype(bool),
        false.astype(bool),
        objects,
    )


def main_kind(metrics: Mapping[str, Any]) -> str:
    """The IoU type by which a model is judged: masks where they were measured, else boxes."""
    return "segm" if "segm" in metrics else "bbox"


class Counts(NamedTuple):
    """Of detections of at least each score; the first axes are those of whatever is counted: draws, classes."""

    true: np.ndarray  # [..., S]
    false: np.ndarray  # [..., S]
    objects: np.ndarray  # [...]

    def numbers(self) -> dict[str, np.ndarray]:
        """F1, precision and recall [..., S]; NaN where there is nothing to divide by."""
        found, objects = self.true + self.false, self.objects[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "f1": np.where(objects > 0, 2 * self.true / (objects + found), np.nan),
                "precision": self.true / found,
                "recall": self.true / objects,
            }


def counts(kept: Kept, rows: np.ndarray, objects: np.ndarray, weights: np.ndarray | None = None) -> Counts:
    """Of the detections `rows`, with images weighted by weights [B, I]; objects: [I] those that can be found."""
    place = np.searchsorted(SCORES, kept.score[rows], side="right") - 1
    seen, image = np.unique(kept.image[rows], return_inverse=True)
    sums = []
    for hits in (kept.true[rows], kept.false[rows]):
        cells = np.bincount((image * len(SCORES) + place)[hits], minlength=len(seen) * len(SCORES))
        cells = cells.reshape(len(seen), len(SCORES))[:, ::-1].cumsum(1)[:, ::-1]
        # as floats, which are multiplied much faster; they are exact far beyond such counts
        sums.append(cells.sum(0) if weights is None else weights[:, seen].astype(np.float64) @ cells)
    return Counts(*sums, objects.sum() if weights is None else weights @ objects)


def choose(found: Counts, criterion: str | Mapping[str, float] = "f1") -> np.ndarray:
    """The index of the chosen score in SCORES, of counts [..., S]; -1 where there is none."""
    numbers = found.numbers()
    if criterion == "f1":
        f1 = np.nan_to_num(numbers["f1"], nan=-1.0)
        best = f1 == f1.max(-1, keepdims=True)
        first = best.argmax(-1)
        at = np.arange(len(SCORES))
        ends = ~best & (at > first[..., None])
        last = np.where(ends.any(-1), ends.argmax(-1), len(SCORES)) - 1  # the middle of equal ones is the surest
        return np.where(f1.max(-1) > 0, (first + last) // 2, -1)
    (name, wished), *_ = criterion.items()
    enough = np.nan_to_num(numbers[name], nan=-1.0) >= wished
    if name == "precision":
        return np.where(enough.any(-1), enough.argmax(-1), -1)
    return np.where(enough.any(-1), len(SCORES) - 1 - enough[..., ::-1].argmax(-1), -1)


def check_criterion(criterion: Any, key: str = "operating_point") -> str | dict[str, float]:
    """f1, {"precision": 0.9} or {"recall": 0.9}. Raises ConfigError for anything else."""
    if isinstance(criterion, Mapping) and len(criterion) == 1:
        (name, wished), *_ = criterion.items()
        number = isinstance(wished, (int, float)) and not isinstance(wished, bool)
        if name in ("precision", "recall") and number and 0 < wished <= 1:
            return {name: float(wished)}
    if criterion == "f1":
        return "f1"
    hint = ""
    if isinstance(criterion, Mapping) and any(isinstance(v, (int, float)) and 1 < v <= 100 for v in criterion.values()):
        hint = "; shares go from 0 to 1, 90 % is 0.9"
    raise ConfigError(f"{key} = {criterion!r}: choose f1, {{precision: 0.9}} or {{recall: 0.9}}{hint}")


def operating_point(
    kept: Kept, iou_type: str, criterion: str | Mapping[str, float] = "f1", samples: int = SAMPLES, seed: int = 0
) -> dict[str, Any]:
    """The operating point of all classes, and of each.

    Returns {"iou_type", "images", "criterion", "all": point, "classes": {name: point}, "counts": {"true", "false":
    {name: [S]}, "objects": {name: number}}}, lists and numbers of Python's. A point is {"objects", "threshold": [score,
    low, high], and likewise "f1", "precision", "recall" there}; None in the place of what there is not.
    """
    rng, images = np.random.default_rng(seed), len(kept.image_ids)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=samples) if images else np.zeros((samples, 0))
    every, table = np.arange(len(kept.score)), {"true": {}, "false": {}, "objects": {}}
    classes = {}
    for k, name in enumerate(kept.categories):
        rows, objects = np.flatnonzero(kept.category == k), kept.objects[:, k]
        found = counts(kept, rows, objects)
        for key, value in zip(("true", "false", "objects"), found):
            table[key][name] = value.astype(np.int64).tolist()
        classes[name] = _point(found, counts(kept, rows, objects, weights), criterion)
    objects = kept.objects.sum(1)
    point = _point(counts(kept, every, objects), counts(kept, every, objects, weights), criterion)
    about = {"iou_type": iou_type, "images": images, "criterion": criterion}
    return {**about, "all": point, "classes": classes, "counts": table}


def _point(found: Counts, drawn: Counts, criterion: str | Mapping[str, float]) -> dict[str, Any]:
    at, objects = int(choose(found, criterion)), int(found.objects)
    if at < 0:
        return {"objects": objects, "threshold": None, **dict.fromkeys(NUMBERS)}
    others = choose(drawn, criterion)
    point: dict[str, Any] = {"objects": objects, "threshold": _interval(SCORES[at], SCORES[others[others >= 0]])}
    numbers, draws = found.numbers(), drawn.numbers()
    return point | {name: _interval(numbers[name][at], draws[name][:, at]) for name in NUMBERS}


def _interval(value: float, draws: np.ndarray) -> list[float | None]:
    draws = draws[~np.isnan(draws)]
    low, high = np.quantile(draws, (0.025, 0.975)).tolist() if len(draws) else (None, None)
    return [float(value), low, high]


# ------------------------------------------------------------------------------------------------- for who predicts


def check_threshold(threshold: Any) -> float | str | dict[str, float]:
    """A score from 0 to 1, best, per_class, {"precision": 0.9} or {"recall": 0.9}. Raises ConfigError otherwise."""
    if isinstance(threshold, Mapping):
        return check_criterion(threshold, "threshold")
    if threshold in (BEST, PER_CLASS):
        return threshold
    if isinstance(threshold, (str, bool)) or not np.isscalar(threshold):
        words = "a score from 0 to 1, best, per_class, {precision: 0.9} or {recall: 0.9}"
        raise ConfigError(f"threshold = {threshold!r}: must be {words}")
    if not 0 <= threshold <= 1:
        percents = f"; {threshold:g} % is threshold={threshold / 100:g}" if 1 < threshold <= 100 else ""
        raise ConfigError(f"threshold = {threshold:g}: must be a score from 0 to 1{percents}")
    return float(threshold)


def thresholds(
    stored: Mapping[str, Any], wanted: str | Mapping[str, float], categories: Sequence[str]
) -> tuple[float | np.ndarray, str]:
    """The score of `wanted` (best, per_class, or a wished precision or recall), or one for each class [K], and a
    sentence that says what it is.

    stored: what `operating_point` returned. Raises ConfigError where no score reaches what is wished.
    """
    if isinstance(wanted, Mapping):
        table = stored["counts"]
        sums = (np.sum([*table[key].values()], axis=0) for key in ("true", "false", "objects"))
        found = Counts(*sums)
        at, numbers = int(choose(found, wanted)), found.numbers()
        (name, wished), *_ = wanted.items()
        if at < 0:
            most = np.nanmax(numbers[name]) if np.isfinite(numbers[name]).any() else 0.0
            raise ConfigError(
                f"threshold = {dict(wanted)}: on the validation images no score has {name} {wished:g}; the most is "
                f"{np.floor(most * 1000) / 1000:g}"
            )
        values = {key: numbers[key][at] for key in NUMBERS}
        text = ", ".join(f"{key.replace('f1', 'F1')} {values[key]:.3f}" for key in ("precision", "recall", "f1"))
        return float(SCORES[at]), f"threshold {SCORES[at]:.3f}: {text} {_where(stored)}"
    whole = stored["all"]
    if whole["threshold"] is None:
        return 0.5, "threshold 0.5: nothing was right on the validation images, so that no score is best"
    usual = whole["threshold"][0]
    if wanted == BEST:
        return usual, f"threshold {usual:.3f}: {_words(stored['criterion'])}, {_numbers(whole)} {_where(stored)}"
    points = [stored["classes"].get(name) for name in categories]
    own = [bool(point and point["threshold"] and point["objects"] >= FEW_OBJECTS) for point in points]
    values = np.array([point["threshold"][0] if good else usual for point, good in zip(points, own)])
    text = f"thresholds {values.min():.3f} to {values.max():.3f}: {_words(stored['criterion'])} of each class"
    if not all(own):
        text += f", of {own.count(False)} with fewer than {FEW_OBJECTS} objects that of all"
    return values, f"{text} {_where(stored)}"


def describe(stored: Mapping[str, Any]) -> str:
    """The operating point in a sentence, with intervals."""
    whole = stored["all"]
    if whole["threshold"] is None:
        return f"no score has {_words(stored['criterion'])} {_where(stored)}"
    score, low, high = whole["threshold"]
    return (
        f"threshold {score:.3f} [{low:.3f}, {high:.3f}]: {_words(stored['criterion'])}, {_numbers(whole, True)} "
        f"{_where(stored)}"
    )


def _words(criterion: str | Mapping[str, float]) -> str:
    if criterion == "f1":
        return "best F1"
    (name, wished), *_ = criterion.items()
    return f"{name} of at least {wished:g}"


def _numbers(point: Mapping[str, Any], intervals: bool = False) -> str:
    def text(name: str) -> str:
        value, low, high = point[name]
        return f"{value:.3f} [{low:.3f}, {high:.3f}]" if intervals and low is not None else f"{value:.3f}"

    return f"F1 {text('f1')}, precision {text('precision')}, recall {text('recall')}"


def _where(stored: Mapping[str, Any]) -> str:
    return f"on {stored['images']} validation images ({TITLES[stored['iou_type']]} IoU {IOU:g})"
