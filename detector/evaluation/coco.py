"""COCO's detection metrics, from annotations and results in COCO's JSON format.

The numbers are those of pycocotools: hotcoco computes the same ones, bit for bit, some sixty times faster. Both see the
same checked copy of the data, so that neither can change the caller's objects.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_tools

from detector.evaluation.boundary import BoundaryEval

BOX_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KEYPOINT_METRICS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
IOU_TYPES = ("bbox", "segm", "boundary", "keypoints")
BACKENDS = ("hotcoco", "pycocotools")
FIELD = {"bbox": "bbox", "segm": "segmentation", "boundary": "segmentation", "keypoints": "keypoints"}


def coco_metrics(
    annotations: str | Path | dict,
    predictions: str | Path | list[dict],
    iou_type: str = "bbox",
    backend: str = "hotcoco",
    per_class: bool = False,
    mask_area: bool = False,
    sigmas: Sequence[float] | None = None,
) -> dict:
    """COCO average precision and recall as fractions of 1; -1 where there is nothing to measure, as COCO says it.

    annotations: COCO instances (path of a JSON file, or the loaded dict). predictions: COCO results (path or list).
    iou_type: bbox, segm, keypoints, or boundary (Cheng et al., "Boundary IoU", CVPR 2021; see boundary.py).
    backend: hotcoco or pycocotools; boundary always runs on pycocotools, whose IoU can be replaced.
    per_class: adds "per_class", {category name: {the same numbers}}.
    mask_area: where results hold a box and a mask, pycocotools tells small from large unmatched detections by the
    box's area. True takes the mask's, as detectron2 and results without boxes do: APs, APm, APl differ a little.
    sigmas: keypoint fall-offs, one per keypoint; None: `coco_sigmas`.

    Returns {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"}; for keypoints
    COCO's ten instead. Raises ValueError or TypeError naming entry, field and value, FileNotFoundError for a path.
    """
    evaluator, categories = run_coco_eval(annotations, predictions, iou_type, backend, mask_area, sigmas)
    names = KEYPOINT_METRICS if iou_type == "keypoints" else BOX_METRICS
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    metrics = dict(zip(names, map(float, evaluator.stats)))
    if per_class:
        metrics["per_class"] = {
            c["name"]: _summary(precision[:, :, [k]], recall[:, [k]], names) for k, c in enumerate(categories)
        }
    return metrics


def run_coco_eval(annotations, predictions, iou_type="bbox", backend="hotcoco", mask_area=False, sigmas=None):
    """The backend's evaluator after evaluate, accumulate and summarize, and the categories in its order (by id)."""
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type is {iou_type!r}; choose one of {', '.join(IOU_TYPES)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose one of {', '.join(BACKENDS)}")
    truth = check_annotations(annotations, iou_type)
    results = check_predictions(predictions, truth, iou_type)
    if mask_area and iou_type in ("segm", "boundary"):
        results = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    sigmas = _check_sigmas(sigmas, truth) if iou_type == "keypoints" else None
    if backend == "hotcoco" and iou_type != "boundary":
        evaluator = _hotcoco(truth, results, iou_type)
    else:
        evaluator = _pycocotools(truth, results, iou_type)
    if sigmas is not None:
        evaluator.params.kpt_oks_sigmas = sigmas if backend == "pycocotools" else sigmas.tolist()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
        # hotcoco's summarize prints past sys.stdout
        evaluator.summary_lines() if hasattr(evaluator, "summary_lines") else evaluator.summarize()
    return evaluator, truth["categories"]


def _hotcoco(truth, results, iou_type):
    from hotcoco import COCO, COCOeval

    ground_truth = COCO(truth)
    return COCOeval(ground_truth, ground_truth.load_res(results), iou_type)


def _pycocotools(truth, results, iou_type):
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


def _summary(precision: np.ndarray, recall: np.ndarray, names: tuple[str, ...]) -> dict[str, float]:
    """The named numbers from precision [T, 101, K, A, M] and recall [T, K, A, M] (T thresholds, A areas, M limits)."""
    areas = {"s": 1, "m": 2, "l": 3} if precision.shape[3] == 4 else {"m": 1, "l": 2}
    limits = {"1": 0, "10": 1}

    def mean(name: str) -> float:
        values, option = (precision, name[2:]) if name.startswith("AP") else (recall, name[2:])
        values = values[..., areas.get(option, 0), limits.get(option, -1)]
        if option in ("50", "75"):
            values = values[[0 if option == "50" else 5]]
        values = values[values > -1]
        return float(values.mean()) if values.size else -1.0

    return {name: mean(name) for name in names}


# ------------------------------------------------------------------------------------------------------------- checks


def read_json(source, what: str):
    """`source` itself if it is no path, else the content of that JSON file."""
    if not isinstance(source, (str, Path)):
        return source
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{what} file {source} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} file {source} is not JSON: {error}") from None


def check_annotations(annotations, iou_type: str = "bbox") -> dict:
    """A checked copy of COCO annotations in which iscrowd, area and ids 1..n are always there."""
    data = read_json(annotations, "annotation")
    where = f"annotations ({annotations})" if isinstance(annotations, (str, Path)) else "annotations"
    if not isinstance(data, dict):
        raise TypeError(
            f"{where}: expected a COCO dict with images, annotations and categories, got {type(data).__name__}"
        )
    for key in ("images", "annotations", "categories"):
        if not isinstance(data.get(key), list):
            raise ValueError(f"{where}: {key!r} must be a list, got {type(data.get(key)).__name__}")
    images = _unique_ids(data["images"], f"{where}: images")
    category_ids = _unique_ids(data["categories"], f"{where}: categories")
    names = Counter(c.get("name") for c in data["categories"])
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{where}: category names must be there and differ; repeated: {repeated[:5]}")
    copies = []
    for i, entry in enumerate(data["annotations"]):
        check_annotation(entry, f"{where}: annotations[{i}]", images, category_ids, iou_type)
        # pycocotools matches by id, where 0 means unmatched and a repeated id loses an object
        entry = {**entry, "id": i + 1, "iscrowd": int(entry.get("iscrowd") or 0)}
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
        copies.append(entry)
    categories = sorted(data["categories"], key=lambda c: c["id"])
    return {"images": data["images"], "annotations": copies, "categories": categories}


def check_annotation(entry, label: str, images, category_ids, iou_type: str = "bbox") -> None:
    """Raise ValueError or TypeError if one entry of `annotations` cannot be used."""
    if not isinstance(entry, dict):
        raise TypeError(f"{label} must be a dict, got {type(entry).__name__}")
    label, field = f"{label} (id {entry.get('id')})", FIELD[iou_type]
    _check_ids(entry, images, category_ids, label)
    if entry.get(field) is None or (field == "segmentation" and not entry[field]):
        raise ValueError(f"{label} has no {field!r}, which iou_type={iou_type!r} needs")
    _check_box(entry.get("bbox"), label)


def check_predictions(predictions, truth: dict, iou_type: str = "bbox") -> list[dict]:
    """A checked copy of COCO results for the images and categories of `truth`."""
    data = read_json(predictions, "prediction")
    where = f"predictions ({predictions})" if isinstance(predictions, (str, Path)) else "predictions"
    if not isinstance(data, list):
        raise TypeError(f"{where}: expected a list of COCO results, got {type(data).__name__}")
    images = {image["id"]: image for image in truth["images"]}
    category_ids = {category["id"] for category in truth["categories"]}
    field = FIELD[iou_type]
    copies = []
    for i, entry in enumerate(data):
        label = f"{where}[{i}]"
        if not isinstance(entry, dict):
            raise TypeError(f"{label}: expected a dict, got {type(entry).__name__}")
        _check_ids(entry, images, category_ids, label)
        if not _is_number(entry.get("score")):
            raise ValueError(f"{label}: score is {entry.get('score')!r}; it must be a finite number")
        if field not in entry:
            raise ValueError(f"{label} has no {field!r}, which iou_type={iou_type!r} needs; it has {sorted(entry)}")
        if "bbox" in entry:
            _check_box(entry["bbox"], label)
        entry = dict(entry)
        if field == "segmentation":
            entry[field] = as_rle(entry[field], images[entry["image_id"]], label)
        copies.append(entry)
    return copies


def _is_number(value) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _unique_ids(entries: list, where: str) -> set[int]:
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    if wrong := [i for i in ids if not isinstance(i, int)]:
        raise ValueError(f"{where}: every entry needs an integer 'id', got {wrong[0]!r}")
    if repeated := [i for i, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"{where}: ids must differ; repeated: {repeated[:5]}")
    return set(ids)


def _check_ids(entry: dict, images, category_ids, label: str) -> None:
    for field, known in (("image_id", images), ("category_id", category_ids)):
        value = entry.get(field)
        if not isinstance(value, (int, np.integer)) or value not in known:
            raise ValueError(
                f"{label}: {field} is {value!r}, which is not one of the {len(known)} known ids "
                f"(the first: {sorted(known)[:5]}); do annotations and predictions belong together?"
            )


def _check_box(box, label: str):
    if not isinstance(box, (list, tuple, np.ndarray)) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"{label}: bbox is {box!r}; it must be [x, y, width, height], four finite numbers")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(f"{label}: bbox is {box!r}; width and height cannot be negative")
    return box


def as_rle(segmentation, image: dict, label: str) -> dict:
    """Polygons or any RLE as compressed RLE, which is the one form that loadRes takes without a box."""
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), (str, bytes)):
        rle = segmentation
    elif "height" not in image or "width" not in image:
        raise ValueError(f"{label}: image {image['id']} needs 'height' and 'width' to draw the segmentation")
    else:
        try:
            rle = rle_tools.frPyObjects(segmentation, image["height"], image["width"])
            rle = rle if isinstance(rle, dict) else rle_tools.merge(rle)
        except Exception as error:
            raise ValueError(
                f"{label}: segmentation must be polygons or an RLE with 'size', 'counts': {error}"
            ) from None
    size = [image.get("height"), image.get("width")]
    if None not in size and list(rle.get("size") or []) != size:
        raise ValueError(f"{label}: segmentation size is {rle.get('size')}, image {image['id']} is {size}")
    return rle


def coco_sigmas(count: int) -> np.ndarray:
    """Fall-offs [count] of the object keypoint similarity: COCO's own for 17 keypoints, else their mean for each.

    COCO measured them as the spread of annotators' clicks; for other skeletons nobody has. With the mean a keypoint
    counts as hard to place as COCO's are on average, whatever the number of keypoints, so that the AP of two skeletons
    can be compared.
    """
    from pycocotools.cocoeval import Params

    usual = Params("keypoints").kpt_oks_sigmas
    return usual if count == len(usual) else np.full(count, usual.mean())


def _check_sigmas(sigmas, truth: dict) -> np.ndarray | None:
    counts = {len(a["keypoints"]) // 3 for a in truth["annotations"]}
    if len(counts) > 1:
        raise ValueError(f"annotations: objects have {sorted(counts)} keypoints; all must have the same")
    if not counts:  # nothing to measure
        return None
    sigmas = coco_sigmas(*counts) if sigmas is None else np.asarray(sigmas, dtype=float)
    if counts - {len(sigmas)} or not (sigmas > 0).all():
        raise ValueError(f"sigmas must be positive and one per keypoint ({sorted(counts)}), got {sigmas.tolist()}")
    return sigmas
