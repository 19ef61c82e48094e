"""COCO's detection metrics, from annotations and results in COCO's JSON format.

The numbers are those of pycocotools: hotcoco computes the same ones, bit for bit, some sixty times faster. Both see the
same checked fields, as the one reader of annotation files (data/read_coco.py) takes them, and nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from detector.data.annotations import Truth
from detector.data.outlines import are_whole
from detector.data.read_coco import OtherSize, Problems, number, read_json, read_mask, read_truth, whole
from detector.data.several import read_truths
from detector.evaluation.boundary import BoundaryEval
from detector.settings import COCO_LIMITS, check_limits


def box_metrics(limits: Sequence[int] = COCO_LIMITS) -> tuple[str, ...]:
    """The names of the numbers of boxes and masks; limits: detections that count, AP takes the last."""
    recalls = (f"AR{limit}" for limit in limits)
    return ("AP", "AP50", "AP75", "APs", "APm", "APl", *recalls, "ARs", "ARm", "ARl")


BOX_METRICS = box_metrics()
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
IOU_TYPES = ("bbox", "segm", "boundary", "keypoints")
BACKENDS = ("hotcoco", "pycocotools")
BLOCK = 256  # results whose masks are checked at once: what lies in a cache
FIELD = {"bbox": "bbox", "segm": "segmentation", "boundary": "segmentation", "keypoints": "keypoints"}


def coco_metrics(
    annotations: str | Path | dict | Truth,
    predictions: str | Path | list[dict],
    iou_type: str = "bbox",
    backend: str = "hotcoco",
    per_class: bool = False,
    mask_area: bool = False,
    sigmas: Sequence[float] | None = None,
    max_detections: Sequence[int] = COCO_LIMITS,
) -> dict:
    """COCO average precision and recall as fractions of 1; -1 where there is nothing to measure, as COCO says it.

    annotations: COCO instances (path of a JSON file, or the loaded dict), a list of paths as in data.val.annotations,
    or the truth of a data set. predictions: COCO results (path or list).
    iou_type: bbox, segm, keypoints, or boundary (Cheng et al., "Boundary IoU", CVPR 2021; see boundary.py).
    backend: hotcoco or pycocotools; boundary always runs on pycocotools, whose IoU can be replaced.
    per_class: adds "per_class", {category name: {the same numbers}}.
    mask_area: where results hold a box and a mask, pycocotools tells small from large unmatched detections by the
    box's area. True takes the mask's, as detectron2 and results without boxes do: APs, APm, APl differ a little.
    sigmas: keypoint fall-offs, one per keypoint; None: `coco_sigmas`.
    max_detections: how many detections of a class in an image count, best first: AP takes the last number, AR each.
    With COCO's own, keypoints take COCO's 20, with others the last too.

    Returns {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}, the AR named after
    `max_detections`; for keypoints COCO's ten instead. Objects without a mask are left out of "segm" and "boundary":
    detections on their boxes are neither right nor wrong. Raises ValueError or TypeError naming entry, field and value,
    FileNotFoundError for a path.
    """
    limits = check_limits(max_detections)
    evaluator, categories = run_coco_eval(annotations, predictions, iou_type, backend, mask_area, sigmas, limits)
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    metrics = summarized(evaluator, iou_type, limits)
    if per_class:
        metrics["per_class"] = {
            name: _summary(precision[:, :, [k]], recall[:, [k]], iou_type, limits) for k, name in enumerate(categories)
        }
    return metrics


def summarized(evaluator, iou_type: str, limits: Sequence[int]) -> dict[str, float]:
    """The numbers of an evaluator of `run_coco_eval`."""
    if tuple(limits) != COCO_LIMITS:  # pycocotools' own summary knows no other
        return _summary(evaluator.eval["precision"], evaluator.eval["recall"], iou_type, limits)
    return dict(zip(KEYPOINT_METRICS if iou_type == "keypoints" else BOX_METRICS, map(float, evaluator.stats)))


def run_coco_eval(
    annotations,
    predictions,
    iou_type="bbox",
    backend="hotcoco",
    mask_area=False,
    sigmas=None,
    max_detections=COCO_LIMITS,
):
    """The backend's evaluator after evaluate and accumulate (with COCO's limits summarize, too), and the names of its
    categories, in order."""
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type is {iou_type!r}; choose one of {', '.join(IOU_TYPES)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    truth = check_annotations(annotations, iou_type)
    sigmas = _check_sigmas(sigmas, truth) if iou_type == "keypoints" else None
    results = check_predictions(predictions, truth, iou_type)
    if mask_area and iou_type in ("segm", "boundary"):
        results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    run = _hotcoco if backend == "hotcoco" and iou_type != "boundary" else run_pycocotools
    evaluator = run(*for_backend(truth, results, iou_type), iou_type)
    if sigmas is not None:
        evaluator.params.kpt_oks_sigmas = sigmas if backend == "pycocotools" else sigmas.tolist()
    usual = tuple(max_detections) == COCO_LIMITS
    if not usual:
        evaluator.params.maxDets = list(max_detections)[-1:] if iou_type == "keypoints" else list(max_detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
        if usual:  # hotcoco's summarize prints past sys.stdout
            evaluator.summary_lines() if hasattr(evaluator, "summary_lines") else evaluator.summarize()
    return evaluator, truth.categories


def _hotcoco(truth, results, iou_type):
    from hotcoco import COCO, COCOeval

    ground_truth = COCO(truth)
    return COCOeval(ground_truth, ground_truth.load_res(results), iou_type)


def run_pycocotools(truth, results, iou_type):
    """pycocotools' evaluator of what `for_backend` gives."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth, detections = COCO(), COCO()
        ground_truth.dataset = truth
        ground_truth.createIndex()
        if results:
            detections = ground_truth.loadRes(results)
        else:  # loadRes looks at the first result
            detections.dataset = {**truth, "annotations": []}
            detections.createIndex()
        return (BoundaryEval if iou_type == "boundary" else COCOeval)(
            ground_truth, detections, "segm" if iou_type == "boundary" else iou_type
        )


def _summary(
    precision: np.ndarray, recall: np.ndarray, iou_type: str, limits: Sequence[int] = COCO_LIMITS
) -> dict[str, float]:
    """COCO's numbers from precision [T, 101, K, A, M] and recall [T, K, A, M] (T thresholds, A areas, M limits)."""
    points = iou_type == "keypoints"
    names = KEYPOINT_METRICS if points else box_metrics(limits)
    areas = {"m": 1, "l": 2} if points else {"s": 1, "m": 2, "l": 3}
    places = {} if points else {f"AR{limit}": place for place, limit in enumerate(limits)}

    def mean(name: str) -> float:
        values, option = (precision, name[2:]) if name.startswith("AP") else (recall, name[2:])
        values = values[..., areas.get(option, 0), places.get(name, -1)]
        if option in ("50", "75") and name not in places:
            values = values[[0 if option == "50" else 5]]
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    return {name: mean(name) for name in names}


# ------------------------------------------------------------------------------------------------------------- checks


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """For what makes millions of small dicts, none in a cycle: the collector would look through all again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Results(list):
    """COCO results that are known to be right: those of `check_predictions`, or our own."""


def check_annotations(
    annotations: str | Path | Sequence[str | Path] | Mapping | Truth, iou_type: str = "bbox"
) -> Truth:
    """COCO annotations as the reader takes them. Raises ValueError if they lack what an IoU type compares with."""
    read = read_truths if isinstance(annotations, (list, tuple)) else read_truth
    truth = read(annotations, masks=iou_type in ("segm", "boundary"), keypoints=iou_type == "keypoints")
    lacking = {"bbox": False, "segmentation": not truth.has_mask().any(), "keypoints": not truth.keypoints.shape[1]}
    if len(truth.labels) and lacking[field := FIELD[iou_type]]:
        raise ValueError(f"annotations: no object has a {field!r}, which iou_type={iou_type!r} needs")
    return truth


@_without_collector()
def for_backend(
    truth: Truth, results: list[dict], iou_type: str = "bbox", rescore: bool = True
) -> tuple[dict, list[dict]]:
    """Truth and results as every backend takes them, fresh objects that it may change.

    rescore: masks count by their own score, `mask_score`, where results have one.

    Images and categories have ids 1, 2, ... in the order of the file's, which may be negative. Where masks are
    compared, an object without one is the crowd region of its box: nothing on it counts.
    """
    masks = FIELD[iou_type] == "segmentation"
    content = truth.to_coco(segmentation=masks, keypoints=iou_type == "keypoints")
    content["images"].sort(key=lambda image: image["id"])
    image_of = {image["id"]: rank for rank, image in enumerate(content["images"], 1)}
    category_of = {category["id"]: rank for rank, category in enumerate(content["categories"], 1)}
    for image in content["images"]:
        image["id"] = image_of[image["id"]]
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if key in image:
                image[key] = [category_of[id_] for id_ in image[key]]
    for category in content["categories"]:
        category["id"] = category_of[category["id"]]
    sized = {image["id"] for image in content["images"] if "height" in image}
    for entry in content["annotations"]:
        if masks and image_of[entry["image_id"]] not in sized:
            raise ValueError(f"image {entry['image_id']} needs 'height' and 'width' to draw the segmentation")
        entry["image_id"], entry["category_id"] = image_of[entry["image_id"]], category_of[entry["category_id"]]
        if masks and "segmentation" not in entry:
            x, y, w, h = entry["bbox"]
            entry |= {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "iscrowd": 1, "ignore": 1}
    ids = ((image_of[entry["image_id"]], category_of[entry["category_id"]]) for entry in results)
    found = [{**r, "image_id": image, "category_id": category} for r, (image, category) in zip(results, ids)]
    for entry in found if masks and rescore else ():
        entry["score"] = entry.get("mask_score", entry["score"])
    return content, found


@_without_collector()
def check_predictions(predictions: str | Path | list[dict], truth: Truth, iou_type: str = "bbox") -> Results:
    """A checked copy of COCO results for the images and categories of `truth`: ids, score and what is compared.

    Raises ValueError or TypeError naming entry, field and value. Numbers written as text and other forms of masks that
    can only mean one thing are read, and counted in one warning.
    """
    field = FIELD[iou_type]
    if isinstance(predictions, Results):
        if any(field not in entry for entry in predictions):
            raise ValueError(f"predictions have no {field!r}, which iou_type={iou_type!r} needs")
        return predictions
    path = isinstance(predictions, (str, Path))
    data = read_json(predictions, "prediction") if path else predictions
    where = f"predictions ({predictions})" if path else "predictions"
    if not isinstance(data, list):
        raise TypeError(f"{where}: expected a list of COCO results, got {type(data).__name__}")
    sizes = dict(zip(truth.image_ids.tolist(), truth.image_sizes.tolist()))
    known = {"image_id": sizes, "category_id": set(truth.category_ids)}
    problems, checked = Problems(where), Results()
    plain = _plain_rles(data, sizes) if field == "segmentation" else {}
    for i, entry in enumerate(data):
        label = f"{where}[{i}]"
        if not isinstance(entry, dict):
            raise TypeError(f"{label}: expected a dict, got {type(entry).__name__}")
        result = {key: _check_id(entry, key, ids, label, problems) for key, ids in known.items()}
        if (score := number(entry.get("score"))) is None:
            raise ValueError(f"{label}: score is {entry.get('score')!r}; it must be a finite number")
        if isinstance(entry["score"], str):
            problems.notice("score written as text, read as a number", f"{label} score={entry['score']!r}")
        result["score"] = score
        if "mask_score" in entry:
            if (own := number(entry["mask_score"])) is None:
                raise ValueError(f"{label}: mask_score is {entry['mask_score']!r}; it must be a finite number")
            result["mask_score"] = own
        if entry.get(field) is None:
            raise ValueError(f"{label} has no {field!r}, which iou_type={iou_type!r} needs; it has {sorted(entry)}")
        if entry.get("bbox") is not None:
            result["bbox"] = _check_box(entry["bbox"], label)
        if field == "segmentation":
            result[field] = plain.get(i) or as_rle(entry[field], sizes[result["image_id"]], label, problems)
        elif field == "keypoints":
            result[field] = _check_keypoints(entry[field], truth.keypoints.shape[1], label)
        checked.append(result)
    if field != "bbox" and not all("bbox" in entry for entry in checked):  # pycocotools asks the first one only
        checked = Results({key: value for key, value in entry.items() if key != "bbox"} for entry in checked)
    problems.report()
    return checked


def _plain_rles(data: list, sizes: Mapping[int, list[int]]) -> dict[int, dict]:
    """place -> mask of the results whose masks are written as COCO writes them and right, checked many at a time."""
    found = {}
    for begin in range(0, len(data), BLOCK):
        block: dict[int, tuple[list[int], bytes]] = {}
        for i, entry in enumerate(data[begin : begin + BLOCK], begin):
            mask = entry.get("segmentation") if isinstance(entry, dict) else None
            if not isinstance(mask, dict) or type(entry.get("image_id")) is not int:
                continue
            size, counts = mask.get("size"), mask.get("counts")
            own = sizes.get(entry["image_id"])
            if own and own[0] and type(size) is list and size == own and all(type(side) is int for side in size):
                if isinstance(counts, str) and counts.isascii():
                    counts = counts.encode()
                if isinstance(counts, bytes):
                    block[i] = own, counts
        whole = are_whole([text for _, text in block.values()], np.array([h * w for (h, w), _ in block.values()], int))
        for (i, (size, counts)), right in zip(block.items(), whole.tolist()):
            if right:
                found[i] = {"size": list(size), "counts": counts}
    return found


def _check_id(entry: dict, field: str, known, label: str, problems: Problems) -> int:
    value, read = entry.get(field), whole(entry.get(field))
    if read is None or read not in known:
        raise ValueError(
            f"{label}: {field} is {value!r}, which is not one of the {len(known)} known ids "
            f"(the first: {sorted(known)[:5]}); do annotations and predictions belong together?"
        )
    if not isinstance(value, (int, np.integer)):
        problems.notice(f"{field} that is not written as a whole number, read as one", f"{label} {field}={value!r}")
    return read


def _check_box(box, label: str) -> list[float]:
    values = list(map(number, box)) if isinstance(box, (list, tuple, np.ndarray)) else []
    if len(values) != 4 or None in values:
        raise ValueError(f"{label}: bbox is {box!r}; it must be [x, y, width, height], four finite numbers")
    if values[2] < 0 or values[3] < 0:
        raise ValueError(f"{label}: bbox is {box!r}; width and height cannot be negative")
    return values


def _check_keypoints(points, count: int, label: str) -> list[float]:
    values = list(map(number, points)) if isinstance(points, (list, tuple, np.ndarray)) else []
    if len(values) != 3 * count or None in values:
        raise ValueError(f"{label}: keypoints must be {count} times x, y, score, finite numbers")
    return values


def as_rle(segmentation, size: Sequence[int], label: str, problems: Problems | None = None) -> dict:
    """Polygons or any run lengths as compressed ones, the one form that loadRes takes without a box.

    size: (height, width) of the image; 0, 0 where it is unknown.
    """
    problems = problems or Problems(label)
    try:
        mask = read_mask(segmentation, size, lambda kind: problems.notice(kind, label))
        if mask is None:
            raise ValueError("there is no polygon of at least three points")
        if not mask.size[0]:
            raise ValueError("its image needs 'height' and 'width' to draw it")
    except OtherSize as error:
        raise ValueError(f"{label}: segmentation {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{label}: segmentation must be polygons or an RLE with 'size', 'counts': {error}") from None
    return mask.rle()


def coco_sigmas(count: int) -> np.ndarray:
    """Fall-offs [count] of the object keypoint similarity: COCO's own for 17 keypoints, else their mean for each.

    COCO measured them as the spread of annotators' clicks; for other skeletons nobody has. With the mean a keypoint
    counts as hard to place as COCO's are on average, whatever the number of keypoints, so that the AP of two skeletons
    can be compared.
    """
    from pycocotools.cocoeval import Params

    usual = Params("keypoints").kpt_oks_sigmas
    return usual if count == len(usual) else np.full(count, usual.mean())


def _check_sigmas(sigmas, truth: Truth) -> np.ndarray | None:
    count = truth.keypoints.shape[1]
    if not len(truth.labels):  # nothing to measure
        return None
    sigmas = coco_sigmas(count) if sigmas is None else np.asarray(sigmas, dtype=float)
    if count != len(sigmas) or not (sigmas > 0).all():
        raise ValueError(f"sigmas must be positive and one per keypoint ([{count}]), got {sigmas.tolist()}")
    return sigmas
