"""Records of a COCO file that are written as COCO's are, and hold nothing to be told: many at a time, as arrays.

msgspec takes a record where its fields have the types below, and skips all others; what it does not take, and what
`check` finds to be in any way odd, is for the reader of single records (read_coco.py), which gives the same for these.

Dimensions: n records, P points.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from detector.data.annotations import starts_of
from detector.data.columns import Codes, chosen, counts_of, image_columns
from detector.data.json_lists import RAW

EDGE = 1e-2  # pixels: the least size of a box that is learnt from, and of what lies in the image
OUT = 1  # pixels that a box may reach out of its image by rounding
FAR = 10  # a polygon that leaves its image by more than ten times its size is none of this image
LIMIT = 2**31


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str = ""
    height: int = 0
    width: int = 0
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None
    series: Any = None
    video_id: Any = None


class _Attributes(msgspec.Struct, gc=False):
    rotation: float = 0.0


class _Box(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    area: float
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0
    ignore: int = 0
    attributes: _Attributes | None = None
    track_id: Any = None


class _Outlined(_Box, gc=False):
    segmentation: list[list[float]] | None = None


IMAGES = msgspec.json.Decoder(list[_Image])
OBJECTS = {
    masks: (msgspec.json.Decoder(list[kind]), msgspec.json.Decoder(kind))
    for masks, kind in ((False, _Box), (True, _Outlined))
}
REFUSED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def series_of(file_name: str, series: Any = None, video_id: Any = None) -> str | None:
    """The series of images that one belongs to: its field `series`, its video, the file whose page it is, or the folder
    of a DICOM file; else none."""
    if series is not None:
        return f"series {series}"
    if video_id is not None:
        return f"video {video_id}"
    file, _, page = file_name.rpartition("#page=")
    if file and page.isdigit():
        return file
    return file_name.rpartition("/")[0] if file_name[-6:].lower().endswith((".dcm", ".dicom")) else None


class PlainImages:
    """The images of a block."""

    def __init__(self, found: list[_Image], ids: np.ndarray, sizes: np.ndarray):
        self.found, self.ids, self.sizes = found, ids, sizes
        self.names = [image.file_name for image in found]
        self.listed = all(image.neg_category_ids is not None for image in found)  # LVIS's lists

    def columns(self, label_of: dict[int, int], federated: bool, series: Codes) -> dict[str, np.ndarray]:
        lists = ([], [])
        for labels, name in zip(lists, ("neg_category_ids", "not_exhaustive_category_ids")):
            groups = [getattr(image, name) or () for image in self.found] if federated else [()] * len(self.found)
            labels += [[label_of[id_] for id_ in ids if id_ in label_of] for ids in groups]
        named = [series_of(image.file_name, image.series, image.video_id) for image in self.found]
        return image_columns(self.ids, self.sizes, self.names, *lists, series.of(named))


def plain_images(data: bytes, max_pixels: int | None) -> PlainImages | None:
    """The images of a JSON list; None where not every one is plain. max_pixels: None where pictures do not matter."""
    try:
        found = IMAGES.decode(data)
    except REFUSED:
        return None
    (ids, odd), *sizes = (_whole([getattr(r, key) for r in found]) for key in ("id", "height", "width"))
    size = np.stack([values for values, _ in sizes], axis=1)
    odd = odd | sizes[0][1] | sizes[1][1]
    known = ((size > 0) & (size < LIMIT)).all(1)
    if max_pixels is None:
        size[~known] = 0
    else:
        odd = odd | ~known | (size.clip(0, LIMIT).prod(1) > max_pixels) | ~np.array([bool(r.file_name) for r in found])
    return None if odd.any() else PlainImages(found, ids, size.astype(np.int32))


def plain_objects(
    data: bytes,
    masks: bool,
    rows_of: Callable[[np.ndarray], np.ndarray],
    sizes: np.ndarray,
    category_ids: Sequence[int],
    learning: bool,
    tracks: Codes,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The plain annotations of a JSON list: their places in it [n], and their columns.

    rows_of: the rows of images by their ids, -1 where there is none. sizes: [I, 2] (height, width) of the images, 0, 0
    where it is unknown. category_ids: of label 1, 2, ..., ascending. learning: nothing to be told of what is learnt.
    tracks: the numbers of track_ids.
    """
    rows, found = _decoded(data, masks)
    fields = list(zip(*map(msgspec.structs.astuple, found))) or [()] * len(OBJECTS[masks][1].type.__struct_fields__)
    integers = [_whole(fields[place]) for place in (0, 1, 2, 5)]
    (ids, image_ids, categories, crowd), odd = (values for values, _ in integers), np.any([o for _, o in integers], 0)
    area = np.fromiter(fields[3], np.float64, len(found))
    box = np.fromiter(chain.from_iterable(fields[4]), np.float64, 4 * len(found)).reshape(-1, 4)
    if any(fields[7]):
        odd |= np.array([attributes is not None and attributes.rotation != 0 for attributes in fields[7]], bool)
    image = rows_of(image_ids)
    odd |= image < 0
    known = np.array(category_ids, np.int64)
    label = np.searchsorted(known, categories).clip(max=len(known) - 1)
    odd |= known[label] != categories
    odd |= (crowd < 0) | (crowd > 1) | ~(area > 0)
    (x1, y1, width, height), (bottom, right) = box.T, sizes[image].T if len(sizes) else np.zeros((2, len(image)))
    with np.errstate(over="ignore"):  # in boxes that are odd
        x2, y2 = x1 + width, y1 + height
        edges = [np.maximum(x1, 0), np.maximum(y1, 0), np.minimum(x2, right), np.minimum(y2, bottom)]
        learnt_box = np.stack(edges, axis=1).astype(np.float32)
    odd |= ~((width >= 0) & (height >= 0) & np.isfinite(x2) & np.isfinite(y2))
    if learning:
        odd |= (width < EDGE) | (height < EDGE)
        odd |= (x1 > right - EDGE) | (y1 > bottom - EDGE) | (x2 < EDGE) | (y2 < EDGE)
        odd |= (x1 < -OUT) | (y1 < -OUT) | (x2 > right + OUT) | (y2 > bottom + OUT)
    groups = [group or () for group in fields[9]] if masks and any(fields[9]) else [()] * len(found)
    outlines = _outlines(groups, odd, np.stack([bottom, right], 1), crowd.astype(bool), learning)
    columns = {
        "image": image.astype(np.int32),
        "id": ids,
        "label": (label + 1).astype(np.int32),
        "box": box,
        "area": area,
        "crowd": crowd.astype(bool),
        "ignored": _whole(fields[6])[0] == 1,
        "keypoints": np.zeros((len(found), 0, 3)),
        "num_keypoints": np.zeros(len(found), np.int32),
        "track": tracks.of(fields[8]),
        "learnt": np.full(len(found), learning),
        "learnt_box": learnt_box,
        "even_odd": np.zeros(len(found), bool),
        **outlines,
        "runs": np.zeros(0, np.uint8),
        "runs_counts": np.zeros(len(found), np.int32),
    }
    return (rows[~odd], chosen(columns, ~odd)) if odd.any() else (rows, columns)


def _decoded(data: bytes, masks: bool) -> tuple[np.ndarray, list[_Box]]:
    """The records whose fields have the right types, and their places."""
    every, single = OBJECTS[masks]
    try:
        found = every.decode(data)
        return np.arange(len(found)), found
    except msgspec.ValidationError:
        rows, found = [], []
        with contextlib.suppress(*REFUSED):
            for row, record in enumerate(RAW.decode(data)):
                with contextlib.suppress(msgspec.ValidationError):
                    found.append(single.decode(record))
                    rows.append(row)
            return np.array(rows, np.int64), found
    except REFUSED:
        pass
    return np.zeros(0, np.int64), []


def _outlines(
    groups: list[Sequence[list[float]]], odd: np.ndarray, size: np.ndarray, crowd: np.ndarray, learning: bool
) -> dict[str, np.ndarray]:
    """The columns of polygons, groups: of each record; sets `odd` [n] where they are not plain."""
    polygons = list(chain.from_iterable(groups)) if any(groups) else []
    if polygons:
        lengths, owners = counts_of(polygons), np.repeat(np.arange(len(groups)), counts_of(groups))
        odd[owners[(lengths < 6) | (lengths % 2 == 1)]] = True
        groups = [() if wrong else group for group, wrong in zip(groups, odd.tolist())]
        polygons = list(chain.from_iterable(groups))
    counts, rings = counts_of(groups), counts_of(polygons) // 2
    values = np.fromiter(chain.from_iterable(polygons), np.float64, 2 * int(rings.sum()))
    points = values.reshape(-1, 2)
    point_counts = np.diff(starts_of(rings)[starts_of(counts)]).astype(np.int32)
    has = point_counts > 0
    if has.any():
        starts = (starts_of(point_counts)[:-1])[has]
        extent = np.concatenate([np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)], axis=1)
        height, width = size[has].T
        odd[has] |= (height == 0) | (abs(extent).max(1) > FAR * np.maximum(height, width))
        if learning:
            with np.errstate(over="ignore"):
                left, top, right, bottom = extent.astype(np.float32).astype(np.float64).T
            seen = (np.minimum(right, width) > np.maximum(left, 0)) & (np.minimum(bottom, height) > np.maximum(top, 0))
            odd[has] |= ~seen & ~crowd[has]
    columns = {"rings": rings, "rings_counts": counts, "points": points, "points_counts": point_counts}
    learnt = ~crowd if learning else np.zeros(len(groups), bool)
    mine = columns if learnt.all() or not has.any() else chosen(columns, learnt)
    for name, values in mine.items():
        columns_of = values.astype(np.float32) if name == "points" else values
        if name.endswith("_counts") and len(values) < len(groups):
            columns_of = np.zeros(len(groups), np.int32)
            columns_of[learnt] = values
        columns = columns | {f"learnt_{name}": columns_of}
    return columns


def _whole(values: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """[n] int64, and [n] bool: which are none."""
    try:
        return np.fromiter(values, np.int64, len(values)), np.zeros(len(values), bool)
    except OverflowError:
        odd = np.array([not -(2**63) <= value < 2**63 for value in values])
        return np.array([0 if wrong else value for value, wrong in zip(values, odd)], np.int64), odd
