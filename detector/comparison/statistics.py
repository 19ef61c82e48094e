"""How sure a difference in AP is: COCO's matching kept image by image, resampled, and compared in pairs.

AP is no mean over images, so its error bar comes from the bootstrap (Efron 1979): images are drawn with replacement as
often as there are, and the whole AP is computed anew for each draw. An image that is drawn w times counts w times: its
detections and objects get weight w, the matching stays. Methods are compared on the same draws. Each draw keeps its
multiplicity: to count a repeated image once, as some libraries do, samples 63 % of the images without replacement and
gives intervals about a quarter too narrow.

Dimensions: I images, D detections, K categories, A = 4 areas (all, small, medium, large), T = 10 IoU thresholds,
B draws, S seeds (training runs of one method).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from hotcoco import mask as rle_tools
from pycocotools import mask as polygon_tools
from scipy import special

from detector.evaluation.boundary import with_boundaries
from detector.evaluation.coco import FIELD, check_annotations, check_predictions, for_backend
from detector.settings import COCO_LIMITS

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = np.array([[0, 1e10], [0, 32**2], [32**2, 96**2], [96**2, 1e10]])


class Bands(NamedTuple):
    """Objects that are measured apart in place of COCO's small, medium and large ones: those whose value lies within a
    band's limits. Results that found none count in the bands of their own area; in all, where values are no areas."""

    limits: np.ndarray  # [A, 2]; the first band holds everything
    values: np.ndarray | None = None  # [G] of the objects in the order of the annotations; None: their areas


COCO_BANDS = Bands(AREAS)


class MatchedDetections(NamedTuple):
    """Which detections found an object, for all areas and thresholds; detections in the order of images."""

    image_ids: np.ndarray  # [I]
    categories: list[str]  # K names
    image: np.ndarray  # [D] index of the image
    category: np.ndarray  # [D] index of the category
    score: np.ndarray  # [D]
    true: np.ndarray  # [D, A, T] bool: found an object
    false: np.ndarray  # [D, A, T] bool: found none. Neither: does not count (crowd, other size)
    objects: np.ndarray  # [I, K, A] number of objects that count


class Table(NamedTuple):
    """Average precision and largest recall of each draw; NaN where a draw has no object."""

    precision: np.ndarray  # [B, K, A, T]
    recall: np.ndarray  # [B, K, A, T]


def match(
    annotations, predictions, iou_type: str = "bbox", limit: int = COCO_LIMITS[-1], bands: Bands = COCO_BANDS
) -> MatchedDetections:
    """COCO's greedy matching. annotations, predictions, iou_type (bbox, segm, boundary): as in coco_metrics. limit: how
    many detections of a category in an image count. bands: A = 4 of them, in the place of COCO's areas."""
    if iou_type not in ("bbox", "segm", "boundary"):
        raise ValueError(f"iou_type is {iou_type!r}; choose bbox, segm or boundary")
    checked = check_annotations(annotations, iou_type)
    truth, results = for_backend(checked, check_predictions(predictions, checked, iou_type), iou_type)
    image_of = {image["id"]: i for i, image in enumerate(truth["images"])}
    category_of = {category["id"]: k for k, category in enumerate(truth["categories"])}
    sizes = {image["id"]: (image.get("height", 0), image.get("width", 0)) for image in truth["images"]}
    real, found = defaultdict(list), defaultdict(list)
    for group, entries in ((real, truth["annotations"]), (found, results)):
        for entry in entries:
            group[image_of[entry["image_id"]], category_of[entry["category_id"]]].append(entry)

    objects = np.zeros((len(image_of), len(category_of), len(AREAS)), np.int32)
    rows, true, false = [], [], []
    for key in sorted(real.keys() | found.keys()):
        detections = sorted(found[key], key=lambda entry: -entry["score"])[:limit]
        ignored = np.array([_ignored(entry, bands) for entry in real[key]], bool).reshape(-1, len(AREAS)).T  # [A, G]
        objects[key] = (~ignored).sum(1)
        if not detections:
            continue
        areas = [_result_area(entry, iou_type) if bands.values is None else np.nan for entry in detections]
        outside = np.array([_outside(area, bands.limits) for area in areas])  # [D, A]
        hit, irrelevant = _assign(_ious(detections, real[key], iou_type, sizes), ignored, real[key])
        rows += [(*key, entry["score"]) for entry in detections]
        true.append(hit & ~irrelevant)
        false.append(~hit & ~outside[:, :, None])
    image, category, score = np.array(rows, float).reshape(-1, 3).T
    shape = (0, len(AREAS), len(THRESHOLDS))
    return MatchedDetections(
        np.sort(checked.image_ids),
        [category["name"] for category in truth["categories"]],
        image.astype(np.int32),
        category.astype(np.int32),
        score,
        np.concatenate([np.zeros(shape, bool), *true]),
        np.concatenate([np.zeros(shape, bool), *false]),
        objects,
    )


def _outside(value: float, limits: np.ndarray) -> np.ndarray:
    return (value < limits[:, 0]) | (value > limits[:, 1])


def _ignored(entry: dict, bands: Bands) -> np.ndarray:
    value = entry["area"] if bands.values is None else bands.values[entry["id"] - 1]
    return _outside(value, bands.limits) | bool(entry["iscrowd"])


def _result_area(entry: dict, iou_type: str) -> float:
    if "bbox" in entry:  # as pycocotools, for masks too
        return entry["bbox"][2] * entry["bbox"][3]
    return float(rle_tools.area(entry[FIELD[iou_type]]))


def _ious(detections: list[dict], real: list[dict], iou_type: str, sizes: dict) -> np.ndarray:
    """[D, G]; the area of the detection is the denominator for crowd regions."""
    if not real:
        return np.zeros((len(detections), 0))
    crowd = [entry["iscrowd"] for entry in real]
    if iou_type == "bbox":
        return rle_tools.iou([d["bbox"] for d in detections], [g["bbox"] for g in real], crowd)
    masks = [[_drawn(e["segmentation"], sizes[e["image_id"]]) for e in group] for group in (detections, real)]
    ious = rle_tools.iou(*masks, crowd)
    if iou_type == "boundary":
        ious = with_boundaries(ious, *masks, crowd)
    return ious


def _drawn(segmentation: list | dict, size: tuple[int, int]) -> dict:
    """Checked polygons or compressed run lengths as the latter."""
    if isinstance(segmentation, dict):
        return segmentation
    return polygon_tools.merge(polygon_tools.frPyObjects(segmentation, *size))


def _assign(ious: np.ndarray, ignored: np.ndarray, real: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """For each detection, best first: did it find an object, and one to be ignored? Both [D, A, T] bool.

    A detection takes the free object of largest IoU, an ignored one only if there is no other; crowds stay free.
    """
    shape = (len(AREAS), len(THRESHOLDS), len(real))
    hit, irrelevant = np.zeros((2, len(ious), *shape[:2]), bool)
    if not real:
        return hit, irrelevant
    ignored, crowd = np.broadcast_to(ignored[:, None], shape), np.array([bool(g["iscrowd"]) for g in real])
    free = np.ones(shape, bool)
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)[None, :, None]
    for d in np.flatnonzero((ious >= THRESHOLDS[0]).any(1)):
        possible = free & (ious[d] >= limits)
        wanted = possible & ~ignored
        wanted = np.where(wanted.any(2, keepdims=True), wanted, possible)
        best = len(real) - 1 - np.where(wanted, ious[d], -1)[..., ::-1].argmax(2)  # the last one of equals
        best = best[..., None]
        hit[d] = wanted.any(2)
        irrelevant[d] = hit[d] & np.take_along_axis(ignored, best, 2)[..., 0]
        taken = hit[d][..., None] & ~crowd[best]
        np.put_along_axis(free, best, np.take_along_axis(free, best, 2) & ~taken, 2)
    return hit, irrelevant


# ----------------------------------------------------------------------------------------------------------- resampling


def draws(images: int, count: int = 1000, seed: int = 0) -> np.ndarray:
    """[count, images]: how often each image is in each bootstrap draw."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=count)


def resample(
    matches: MatchedDetections, weights: np.ndarray | None = None, areas: Sequence[int] = (0, 1, 2, 3), chunk: int = 100
) -> Table:
    """Average precision and recall with images weighted by weights [B, I]; None: the data set as it is, B = 1.

    areas: those to compute; the others are NaN.
    """
    weights = np.ones((1, len(matches.image_ids)), int) if weights is None else weights
    shape = (len(weights), len(matches.categories), len(AREAS), len(THRESHOLDS))
    table = Table(np.full(shape, np.nan), np.full(shape, np.nan))
    for k in range(len(matches.categories)):
        rows = np.flatnonzero(matches.category == k)
        rows = rows[np.argsort(-matches.score[rows], kind="mergesort")]
        for start in range(0, len(weights), chunk):
            part = slice(start, start + chunk)
            counts = weights[part] @ matches.objects[:, k]  # [B, A]
            drawn = weights[part][:, matches.image[rows]]
            for a in (a for a in areas if counts[:, a].any()):
                enough = counts[:, a] > 0
                needed = _needed(counts[enough, a])
                for t in range(len(THRESHOLDS)):
                    true, false = matches.true[rows, a, t], matches.false[rows, a, t]
                    found = _average_precision(true, false, drawn[enough], counts[enough, a], needed)
                    for values, result in zip(table, found):
                        values[part][enough, k, a, t] = result
    return table


def _needed(counts: np.ndarray) -> np.ndarray:
    """[B, 101]: the least number of found objects whose share of `counts` [B] reaches each recall."""
    needed = np.ceil(RECALLS * counts[:, None])
    for step in (1, -1):  # as the division rounds, not as the product does
        shifted = needed - 1 if step > 0 else needed
        reached = shifted / counts[:, None] >= RECALLS
        needed = np.where(reached, shifted, needed) if step > 0 else np.where(reached, needed, needed + 1)
    return needed.clip(0).astype(np.int64)


def _average_precision(
    true: np.ndarray, false: np.ndarray, weights: np.ndarray, counts: np.ndarray, needed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """COCO's 101-point AP and the largest recall, both [B], of detections sorted by score.

    true, false: [D] bool; weights: [B, D]; counts: [B] objects. Precision is only looked at where recall grows.
    """
    at = np.flatnonzero(true)
    if not len(at):
        return np.zeros(len(counts)), np.zeros(len(counts))
    hits = np.cumsum(weights[:, at], axis=1)
    misses = np.add.reduceat(weights[:, : at[-1] + 1] * false[: at[-1] + 1], np.concatenate([[0], at]), axis=1)
    misses = np.cumsum(misses[:, :-1], axis=1)  # false ones before each true one
    precision = hits / (hits + misses + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # one sorted search for all draws: each has its own range of numbers
    offset = np.arange(len(hits))[:, None] * (max(hits.max(), needed.max()) + 1)
    index = np.searchsorted((hits + offset).ravel(), (needed + offset).ravel()).reshape(needed.shape)
    index -= np.arange(len(hits))[:, None] * len(at)
    precision = np.concatenate([precision, np.zeros((len(hits), 1))], axis=1)
    return np.take_along_axis(precision, index, 1).mean(1), hits[:, -1] / counts


def metrics(table: Table, limit: int = COCO_LIMITS[-1]) -> dict[str, np.ndarray]:
    """COCO's numbers [B] of a table of matches with this `limit`, and "curve" [B, T], AP at each IoU threshold; NaN
    where there is nothing."""
    mean = _nanmean
    precision, recall = table
    return {
        "AP": mean(precision[:, :, 0]),
        "AP50": mean(precision[:, :, 0, [0]]),
        "AP75": mean(precision[:, :, 0, [5]]),
        **{name: mean(precision[:, :, a]) for a, name in enumerate(("APs", "APm", "APl"), 1)},
        f"AR{limit}": mean(recall[:, :, 0]),
        "curve": np.stack([mean(precision[:, :, 0, [t]]) for t in range(len(THRESHOLDS))], axis=1),
    }


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over all but the first axis without NaN, and without numpy's warning where all are."""
    values = values.reshape(len(values), -1)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(1) / known.sum(1)


# ----------------------------------------------------------------------------------------------------------- comparison


class Difference(NamedTuple):
    """A difference of two methods, its 95 % interval, and where the uncertainty comes from (standard errors)."""

    delta: float
    low: float
    high: float
    image_error: float
    seed_error: float  # NaN with one seed: then the interval covers the choice of images only

    @property
    def clear(self) -> bool:
        """The interval leaves out zero."""
        return self.low > 0 or self.high < 0


def difference(
    a: Sequence[float],
    b: Sequence[float],
    a_draws: np.ndarray,
    b_draws: np.ndarray,
    paired: bool = True,
    confidence: float = 0.95,
) -> Difference:
    """b - a, of methods whose runs scored a [S] and b [S'] on the data set, a_draws [S, B] and b_draws [S', B] on the
    same draws of its images.

    With one run each, the percentile interval of the draws. With more, paired says that runs with the same index
    belong together (same seed, same data order and initial weights). The half width joins the two sources of chance as
    independent ones: the normal quantile times the error over images, and Student's times that over seeds.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    delta = float(b.mean() - a.mean())
    spread = b_draws.mean(0) - a_draws.mean(0)
    spread = spread[~np.isnan(spread)]
    if np.isnan(delta) or len(spread) < 2:
        return Difference(delta, np.nan, np.nan, np.nan, np.nan)
    image_error = float(spread.std(ddof=1))
    if min(len(a), len(b)) < 2:
        low, high = np.quantile(spread, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Difference(delta, float(low), float(high), image_error, np.nan)
    groups = [b - a] if paired and len(a) == len(b) else [a, b]
    errors = [group.std(ddof=1) / np.sqrt(len(group)) for group in groups]
    level = (1 + confidence) / 2
    widths = [special.stdtrit(len(group) - 1, level) * error for group, error in zip(groups, errors)]
    margin = float(np.linalg.norm([special.ndtri(level) * image_error, *widths]))
    return Difference(delta, delta - margin, delta + margin, image_error, float(np.linalg.norm(errors)))
