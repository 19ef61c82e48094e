"""From a COCO annotation file to `Annotations`, every record checked.

Whatever is wrong in a file is found here, before training starts, and named by file, record, field and value.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from detector.data.annotations import Annotations
from detector.data.outlines import rle_rings

logger = logging.getLogger(__name__)


@dataclass
class Problems:
    """What is wrong in a file, by kind. Errors stop the run unless `on_error` is "skip"; the rest is only reported."""

    path: Path
    on_error: str = "raise"
    found: dict[tuple[bool, str], list[str]] = field(default_factory=dict)

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={self.on_error!r}: must be 'raise' or 'skip'")

    def error(self, kind: str, where: str) -> None:
        self.found.setdefault((True, kind), []).append(where)

    def notice(self, kind: str, where: str) -> None:
        self.found.setdefault((False, kind), []).append(where)

    def report(self) -> None:
        """Raise ValueError for errors where they are not to be skipped; one warning for everything else."""
        lines = {True: [], False: []}
        for (is_error, kind), places in self.found.items():
            shown = "; ".join(places[:5]) + (f"; and {len(places) - 5} more" if len(places) > 5 else "")
            lines[is_error].append(f"{len(places)} x {kind}: {shown}")
        if lines[True] and self.on_error == "raise":
            raise ValueError(
                f"{self.path}: " + "\n  ".join(lines[True]) + "\nMend the file, or leave these records out with "
                "data.on_error=skip"
            )
        if self.found:
            logger.warning("%s:\n  %s", self.path, "\n  ".join(lines[True] + lines[False]))


def read_coco(
    path: str | os.PathLike,
    categories: Sequence[str] | None = None,
    masks: bool = True,
    on_error: str = "raise",
    max_pixels: int = 100_000_000,
    keypoints: bool = False,
    problems: Problems | None = None,
) -> Annotations:
    """Read a COCO instances file.

    Args:
        categories: names of labels 1, 2, ...; by default the file's own, in the order of their ids.
        masks: keep the outlines. A crowd region's outline is never needed: its box is where nothing is learnt.
        on_error: "raise" stops at records that cannot be right (unknown ids, duplicate ids, numbers that are none,
            masks of another size); "skip" leaves them out with a warning. Boxes outside the image or of no size occur
            in COCO itself: they are left out with a warning either way.
        max_pixels: larger images are refused.
        keypoints: keep the keypoints. All categories that have some must have the same.
        problems: collects what is wrong instead of reporting it, for those who report by themselves.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not COCO, no images or no objects, or wrong records and on_error="raise".
    """
    path = Path(path)
    content = _load(path)
    collected, problems = problems, problems or Problems(path, on_error)
    names, ids, label_of = _read_categories(path, content["categories"], categories)
    keypoint_names = _read_keypoint_names(path, content["categories"]) if keypoints else []
    images = _read_images(content["images"], problems, max_pixels)
    listed = {record["id"] for record in content["images"] if isinstance(record, dict) and _is_int(record.get("id"))}
    by_image: dict[int, list[_Object]] = {image_id: [] for image_id in images}
    seen: set[int] = set()
    for number, record in enumerate(content["annotations"]):
        item = _read_object(number, record, images, listed, label_of, seen, masks, len(keypoint_names), problems)
        if item is not None:
            by_image[record["image_id"]].append(item)
    if collected is None:
        problems.report()
    if not images:
        raise ValueError(f"{path}: no usable images ('images' has {len(content['images'])} records)")
    if not any(by_image.values()):
        raise ValueError(f"{path}: no usable objects ('annotations' has {len(content['annotations'])} records)")
    return _pack(names, ids, keypoint_names, images, by_image)


class _Object(NamedTuple):
    id: int
    box: tuple[float, float, float, float]
    label: int
    crowd: bool
    even_odd: bool
    rings: list[np.ndarray]
    keypoints: list[float]


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist: check data.root and the annotation options")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
        raise ValueError(f"{path}: not JSON ({error}); the file may be cut short or of another format") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not COCO: the top level is a {type(content).__name__}, not an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            found = f"is a {type(content[key]).__name__}" if key in content else "is missing"
            raise ValueError(f"{path}: not COCO instances: '{key}' {found}, a list is needed")
    return content


def _read_categories(
    path: Path, records: list, wanted: Sequence[str] | None
) -> tuple[list[str], list[int], dict[int, int]]:
    """Names and ids in the order of labels, and the label of each id."""
    for record in records:
        if not (isinstance(record, dict) and _is_int(record.get("id")) and isinstance(record.get("name"), str)):
            raise ValueError(f"{path}: categories: {record!r} needs an integer 'id' and a text 'name'")
    id_of = {record["name"]: record["id"] for record in records}
    if not records or len(id_of) < len(records) or len(set(id_of.values())) < len(records):
        raise ValueError(f"{path}: categories: ids and names must each occur once, and there must be some: {records!r}")
    names = sorted(id_of, key=id_of.get) if wanted is None else list(wanted)
    unknown, missing = sorted(set(id_of) - set(names)), [name for name in names if name not in id_of]
    if unknown:
        raise ValueError(
            f"{path}: categories {unknown} are not among those of the training set or model, {names}; "
            "categories are matched by name"
        )
    if missing:
        logger.warning("%s: has no categories %s; nothing of them will be found here", path, missing)
    return names, [id_of.get(name, -1) for name in names], {id_of[n]: i + 1 for i, n in enumerate(names) if n in id_of}


def _read_keypoint_names(path: Path, records: list) -> list[str]:
    found = [record["keypoints"] for record in records if record.get("keypoints")]
    if not found or any(names != found[0] for names in found) or not all(isinstance(name, str) for name in found[0]):
        raise ValueError(
            f"{path}: categories: 'keypoints' must be one list of names, there are {found}; "
            "data.keypoints=false leaves keypoints out"
        )
    return found[0]


def leads_out(name: str) -> bool:
    """Whether a file name of an annotation file may mean a file outside the image folder."""
    return os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or "\0" in name


def _read_images(records: list, problems: Problems, max_pixels: int) -> dict[int, tuple[str, int, int]]:
    """File name, height and width by image id."""
    images: dict[int, tuple[str, int, int]] = {}
    names: set[str] = set()
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not _is_int(record.get("id")):
            problems.error("image without an integer id", f"images[{number}]={_short(record)}")
            continue
        where = f"image {record['id']}"
        name, height, width = record.get("file_name"), record.get("height"), record.get("width")
        if not isinstance(name, str) or not name:
            problems.error("image without a file_name", f"{where} file_name={name!r}")
        elif not (_is_int(height) and _is_int(width) and height > 0 and width > 0):
            problems.error("image without a size", f"{where} height={height!r} width={width!r}")
        elif height * width > max_pixels:
            problems.error(f"image over data.max_pixels={max_pixels}", f"{where} {width} x {height}")
        elif leads_out(name):
            problems.error("file_name leads out of the image folder", f"{where} file_name={name!r}")
        elif record["id"] in images:
            problems.error("duplicate image id", f"{where} file_name={name!r} and {images[record['id']][0]!r}")
        else:
            if name in names:
                problems.notice("file_name used by two images", f"{where} file_name={name!r}")
            names.add(name)
            images[record["id"]] = (name, height, width)
    return images


def _read_object(
    number: int,
    record: Any,
    images: dict[int, tuple[str, int, int]],
    listed: set[int],
    label_of: dict[int, int],
    seen: set[int],
    masks: bool,
    num_keypoints: int,
    problems: Problems,
) -> _Object | None:
    """One checked annotation, or None with the reason in `problems`."""
    if not isinstance(record, dict) or not _is_int(record.get("id")):
        return problems.error("annotation without an integer id", f"annotations[{number}]={_short(record)}")
    where, image_id, category_id = f"annotation {record['id']}", record.get("image_id"), record.get("category_id")
    if record["id"] in seen:
        return problems.error("duplicate annotation id", f"{where} (annotations[{number}])")
    seen.add(record["id"])
    if not _is_int(image_id) or image_id not in images:
        if not _is_int(image_id) or image_id not in listed:  # otherwise its image has been reported
            problems.error("unknown image_id", f"{where} image_id={image_id!r}")
        return None
    if not _is_int(category_id) or category_id not in label_of:
        return problems.error("unknown category_id", f"{where} category_id={category_id!r}")
    _, height, width = images[image_id]
    crowd = record.get("iscrowd", 0)
    if crowd not in (0, 1):
        return problems.error("iscrowd is not 0 or 1", f"{where} iscrowd={crowd!r}")

    segmentation, rings, even_odd = record.get("segmentation"), [], False
    if isinstance(segmentation, dict) and segmentation.get("size") != [height, width]:
        size = _short(segmentation.get("size"))
        return problems.error("mask of another size", f"{where} size={size}, the image has [{height}, {width}]")
    if segmentation and ((masks and not crowd) or record.get("bbox") is None):
        try:
            rings, even_odd = _read_rings(segmentation, height, width)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return problems.error("wrong segmentation", f"{where} segmentation: {error}")
        if not rings:
            problems.notice("segmentation without an area, box kept", where)

    bbox = record.get("bbox")
    if bbox is None and rings:
        box = np.concatenate([np.min([r.min(0) for r in rings], axis=0), np.max([r.max(0) for r in rings], axis=0)])
        x1, y1, x2, y2 = box.tolist()
    else:
        if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_finite, bbox))):
            return problems.error("bbox is not four finite numbers", f"{where} bbox={_short(bbox)}")
        x1, y1, w, h = bbox
        x2, y2 = x1 + w, y1 + h
        if w < 1e-2 or h < 1e-2:
            return problems.notice("bbox of no size, object left out", f"{where} bbox={bbox}")
    if x1 > width - 1e-2 or y1 > height - 1e-2 or x2 < 1e-2 or y2 < 1e-2:
        return problems.notice("bbox outside the image, object left out", f"{where} bbox={bbox}")
    if x1 < -1 or y1 < -1 or x2 > width + 1 or y2 > height + 1:  # less is rounding
        problems.notice("bbox reaches out of the image, clipped", f"{where} bbox={bbox} of {width} x {height}")
    box = (max(x1, 0), max(y1, 0), min(x2, width), min(y2, height))
    if crowd or not masks:
        rings = []
    keypoints = record.get("keypoints") or [0] * 3 * num_keypoints
    if num_keypoints and not (
        isinstance(keypoints, list)
        and len(keypoints) == 3 * num_keypoints
        and all(map(_is_finite, keypoints))
        and set(keypoints[2::3]) <= {0, 1, 2}
    ):
        what = f"keypoints are not {num_keypoints} times x, y and visibility 0, 1 or 2"
        return problems.error(what, f"{where} keypoints={_short(keypoints)}")
    return _Object(record["id"], box, label_of[category_id], bool(crowd), even_odd, rings, keypoints)


def _read_rings(segmentation: Any, height: int, width: int) -> tuple[list[np.ndarray], bool]:
    """Rings and whether they fill by the even-odd rule. Raises with what is wrong."""
    if isinstance(segmentation, dict):
        return rle_rings(segmentation["counts"], height, width), True
    if not isinstance(segmentation, list):
        raise ValueError(f"{_short(segmentation)} is neither polygons nor run lengths")
    rings = []
    for polygon in segmentation:
        ring = np.asarray(polygon, np.float32)
        if ring.ndim != 1 or len(ring) % 2 or not np.isfinite(ring).all():
            raise ValueError(f"polygon {_short(polygon)} must be a flat list of finite x, y pairs")
        if len(ring) >= 6:  # less is a line
            rings.append(ring.reshape(-1, 2))
    points = np.concatenate(rings) if rings else np.zeros((1, 2))
    in_image = np.minimum(points.max(0), (width, height)) > np.maximum(points.min(0), 0)
    return (rings if in_image.all() else []), False


def _pack(names, ids, keypoint_names, images, by_image) -> Annotations:
    files = [name.encode() for name, _, _ in images.values()]
    objects = [item for items in by_image.values() for item in items]
    rings = [ring for item in objects for ring in item.rings]
    keypoints = [item.keypoints for item in objects] if keypoint_names else []
    keypoints = np.array(keypoints, np.float32).reshape(len(objects), len(keypoint_names), 3)
    keypoints[..., :2] += 0.5  # COCO's keypoints are indices of pixels
    return Annotations(
        categories=names,
        category_ids=ids,
        keypoint_names=keypoint_names,
        image_ids=np.array(list(images), np.int64),
        image_sizes=np.array([size for _, *size in images.values()], np.int32).reshape(-1, 2),
        file_names=np.frombuffer(b"".join(files), np.uint8),
        file_name_starts=_starts(files),
        object_starts=_starts(by_image.values()),
        object_ids=np.array([item.id for item in objects], np.int64),
        boxes=np.array([item.box for item in objects], np.float32),
        labels=np.array([item.label for item in objects], np.int32),
        crowd=np.array([item.crowd for item in objects], bool),
        even_odd=np.array([item.even_odd for item in objects], bool),
        ring_starts=_starts([item.rings for item in objects]),
        point_starts=_starts(rings),
        points=np.concatenate(rings) if rings else np.zeros((0, 2), np.float32),
        keypoints=keypoints,
    )


def _starts(groups) -> np.ndarray:
    """[groups + 1] int64: where each group starts when they are joined, and where the last one ends."""
    return np.cumsum([0, *map(len, groups)], dtype=np.int64)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
