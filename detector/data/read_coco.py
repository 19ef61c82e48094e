"""From a COCO annotation file to `Annotations`, every record checked: the one reader of training and evaluation.

Whatever is wrong in a file is found here, before training starts, and named by file, record, field and value. What
tools write in another way than COCO, but can only mean one thing, is read as that, and counted. Fields that detection
does not need have no say.
"""

from __future__ import annotations

import ast
import contextlib
import json
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as rle_tools

from detector.data.annotations import Annotations, Truth, starts_of
from detector.data.attributes import AttributeReader, Groups, Said, encode
from detector.data.columns import Codes, Columns, Rows, Seen, chosen, counts_of, image_columns, interleave, order_of
from detector.data.json_lists import Block, JsonList, blocks_of, read_lists
from detector.data.outlines import rle_counts, run_rings
from detector.data.plain import EDGE, FAR, OUT, plain_images, plain_objects, series_of
from detector.data.suspicions import Boxes

logger = logging.getLogger(__name__)

SHOWN = 10  # examples of each kind of problem that are kept
MANY_CROWDS = 0.25  # share of crowd regions that is worth a word; COCO has 0.01
WHOLE = re.compile(r"\s*([+-]?[0-9]{1,19})(?:\.0*)?\s*")
NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*")


@dataclass
class Places:
    """How often something occurs in a file, and where first."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if self.count <= SHOWN:
            self.examples.append(where)


@dataclass
class Problems:
    """What is wrong in a file, by kind. Errors stop the run unless `on_error` is "skip"; the rest is only reported."""

    path: str | Path
    on_error: str = "raise"
    found: dict[tuple[bool, str], Places] = field(default_factory=dict)
    advice: str = "\nMend the file, or leave these records out with data.on_error=skip"
    file: str = ""  # what stands before every place: the name of the file, where there are several

    def __post_init__(self):
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={self.on_error!r}: must be 'raise' or 'skip'")

    def error(self, kind: str, where: str) -> None:
        self.found.setdefault((True, kind), Places()).add(self.file + where)

    def notice(self, kind: str, where: str) -> None:
        self.found.setdefault((False, kind), Places()).add(self.file + where)

    def notices(self, kind: str, places: Places) -> None:
        """A notice at every one of some places."""
        for where in places.examples:
            self.notice(kind, where)
        if places.count:
            self.found[False, kind].count += places.count - len(places.examples)

    @contextlib.contextmanager
    def of_file(self, path: str | Path) -> Iterator[None]:
        """In this context everything is of one of several files."""
        self.file = f"{path}: "
        try:
            yield
        finally:
            self.file = ""

    def report(self) -> None:
        """Raise ValueError for errors where they are not to be skipped; one warning for everything else."""
        lines = {True: [], False: []}
        for (is_error, kind), places in self.found.items():
            more = f"; and {places.count - 5} more" if places.count > 5 else ""
            lines[is_error].append(f"{places.count} x {kind}: {'; '.join(places.examples[:5])}{more}")
        if lines[True] and self.on_error == "raise":
            raise ValueError(f"{self.path}: " + "\n  ".join(lines[True]) + self.advice)
        if self.found:
            logger.warning("%s:\n  %s", self.path, "\n  ".join(lines[True] + lines[False]))


def read_coco(
    source: str | os.PathLike | Mapping,
    categories: Sequence[str] | None = None,
    masks: bool = True,
    on_error: str = "raise",
    max_pixels: int = 100_000_000,
    keypoints: bool = False,
    problems: Problems | None = None,
    truth: bool = True,
    alone: bool = True,
    attributes: bool | Sequence[str] | Groups = False,
) -> Annotations:
    """Read COCO instances to train on or to evaluate a model on.

    Args:
        source: path of a JSON file, or what was loaded from one.
        categories: names of labels 1, 2, ...; by default the file's own, in the order of their ids.
        masks: read the segmentations. A crowd region's outline is not learnt from: its box is where nothing is learnt.
        on_error: "raise" stops at records that cannot be right (unknown ids, numbers that are none, masks of another
            size); "skip" leaves them out with a warning, in training and evaluation. Boxes outside the image or of no
            size occur in COCO itself: nothing is learnt from them, and they are evaluated as COCO does.
        max_pixels: larger images are refused.
        keypoints: keep the keypoints. All categories that have some must have the same.
        problems: collects what is wrong instead of reporting it, for those who report by themselves.
        truth: keep what evaluation compares with.
        alone: refuse a file in which there is nothing to learn; one among several may hold pictures without objects.
        attributes: keep what objects say beside their class: True for all, names of some, or the groups of a training
            set (see attributes.py).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not COCO, no images or nothing to learn from, or wrong records and on_error="raise".
    """
    name, content = _load(source)
    collected, problems = problems, problems or Problems(name, on_error)
    classes = _read_categories(name, content, problems)
    names, ids = labels_of(name, classes.names, classes.ids, categories)
    keypoint_names = _read_keypoint_names(name, content["categories"]) if keypoints else []
    reader = _Reader(problems, classes, masks, len(keypoint_names), max_pixels, truth)
    if attributes:
        table = content.get("attributes")
        table = list(table) if isinstance(table, (list, JsonList)) else ()
        reader.attributes = AttributeReader(name, table, attributes, problems.error, problems.notice)
    reader.read(content)
    if collected is None:
        problems.report()
    if not len(reader.image_ids):
        raise ValueError(f"{name}: no usable images ('images' has {len(content['images'])} records)")
    if not reader.num_learnt and alone:
        raise ValueError(f"{name}: no usable objects ('annotations' has {len(content['annotations'])} records)")
    if text := reader.boxes_seen.wrong():
        raise ValueError(f"{name}: all {reader.objects.length} {text}")
    if alone and reader.num_learnt_crowds == reader.num_learnt:
        raise ValueError(
            f"{name}: all {reader.num_learnt} usable objects are crowd regions (iscrowd: 1): nothing is learnt from "
            "them, and no detection has to find them. Write iscrowd: 0 for single objects"
        )
    label_of = {id_: label for label, id_ in enumerate(ids, 1)}
    own_truth, arrays = reader.pack([label_of[id_] for id_ in classes.ids])
    return Annotations(**arrays, categories=names, category_ids=ids, keypoint_names=keypoint_names, truth=own_truth)


def read_truth(source: str | os.PathLike | Mapping | Truth, masks: bool = True, keypoints: bool = False) -> Truth:
    """Read COCO instances to compare results with: images need no file names, nor sizes where nothing is drawn.

    Raises as `read_coco`. What is a `Truth` already is given back.
    """
    if isinstance(source, Truth):
        return source
    name, content = _load(source)
    problems = Problems(name, advice="")
    classes = _read_categories(name, content, problems)
    reader = _Reader(problems, classes, masks, _count_keypoints(content) if keypoints else 0, None, True)
    reader.read(content)
    problems.report()
    return reader.pack()[0]


# ---------------------------------------------------------------------------------------------------------- whole files


def read_json(path: str | os.PathLike, what: str = "annotation") -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32, with or without a byte-order mark."""
    with _json_file(path, what) as path:
        return json.loads(path.read_bytes())


@contextlib.contextmanager
def _json_file(path: str | os.PathLike, what: str) -> Iterator[Path]:
    path = Path(path)
    if not path.is_file():
        advice = ": check data.root and the annotation options" if what == "annotation" else ""
        raise FileNotFoundError(f"{what} file {path} does not exist{advice}")
    try:
        yield path
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no Unicode, or a number of thousands of digits
        raise ValueError(f"{path}: not JSON ({error}); the file may be cut short or of another format") from None


def _load(source: str | os.PathLike | Mapping) -> tuple[str, Mapping]:
    """What to call it, and its content: of a file, lists that are read block by block."""
    name, content = "annotations", source
    if isinstance(source, (str, os.PathLike)):
        name = str(source)
        with _json_file(source, "annotation") as path:
            content = read_lists(path)
    if not isinstance(content, Mapping):
        kind = content if isinstance(content, type) else type(content)
        raise ValueError(f"{name}: not COCO: the top level is a {kind.__name__}, not an object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), (list, JsonList)):
            kind = content.get(key)
            kind = kind if isinstance(kind, type) else type(kind)
            found = f"is a {kind.__name__}" if key in content else "is missing"
            raise ValueError(f"{name}: not COCO instances: '{key}' {found}, a list is needed")
    return name, {**content, "categories": list(content["categories"])}


class _Classes(NamedTuple):
    """The categories of a file, in the order of their ids."""

    names: list[str]
    ids: list[int]
    frequencies: list[str | None]


def _read_categories(name: str, content: Mapping, problems: Problems) -> _Classes:
    found: dict[int, tuple[str, str | None]] = {}
    for record in content["categories"]:
        id_ = whole(record.get("id")) if isinstance(record, dict) else None
        title = record.get("name") if id_ is not None else None
        if type(title) is int and whole(title) is not None:
            problems.notice("name of a category that is a number, read as text", f"category {id_} name={title}")
            title = str(title)
        if not isinstance(title, str) or not _is_text(title):
            raise ValueError(f"{name}: categories: {_short(record)} needs an integer 'id' and a text 'name'")
        if not isinstance(record["id"], int):
            problems.notice("id that is not written as a whole number, read as one", f"category id={record['id']!r}")
        if id_ in found:
            raise ValueError(
                f"{name}: categories: ids must each occur once; {id_} is that of {found[id_][0]!r} and of {title!r}"
            )
        frequency = record.get("frequency")
        found[id_] = title, frequency if isinstance(frequency, str) and frequency in ("r", "c", "f") else None
    if not found:
        raise ValueError(f"{name}: categories: there must be some, and names must each occur once; there are none")
    others = [record for record in content["categories"] if whole(record["id"]) != 0]
    is_group = 0 in found and others and all(record.get("supercategory") == found[0][0] for record in others)
    if is_group and not _uses(content, 0):  # Roboflow's
        kind = "category 0 is the group of the others and no object uses it, left out"
        problems.notice(kind, f"category 0 name={found.pop(0)[0]!r}")
    by_name = defaultdict(list)
    for id_ in sorted(found):
        by_name[found[id_][0]].append(id_)
    for title, ids in by_name.items():
        if len(ids) == 1:
            continue
        used = Counter(whole(a.get("category_id")) for a in content["annotations"] if isinstance(a, dict))
        if 0 in ids and not used[0]:  # Roboflow's super-category
            problems.notice("category 0 repeats a name and no object uses it, left out", f"category 0 name={title!r}")
            del found[0]
            ids.remove(0)
        if len(ids) > 1:
            counts = " and ".join(f"id {id_} ({used[id_]} objects)" for id_ in ids)
            raise ValueError(
                f"{name}: categories: names must each occur once; {title!r} is that of {counts}. If they mean the "
                f"same, write category_id {ids[-1]} for the objects of {', '.join(map(str, ids[:-1]))} and remove the "
                "others from 'categories'; if not, rename one"
            )
    ids = sorted(found)
    return _Classes([found[id_][0] for id_ in ids], ids, [found[id_][1] for id_ in ids])


def _uses(content: Mapping, category_id: int) -> bool:
    entries = (entry for entry in content["annotations"] if isinstance(entry, dict))
    return any(whole(entry.get("category_id")) == category_id for entry in entries)


def labels_of(
    name: str, known: Sequence[str], ids: Sequence[int], wanted: Sequence[str] | None, quiet: bool = False
) -> tuple[list[str], list[int | None]]:
    """Names in the order of labels, and the id of each in a file that has the categories `known`.

    Raises ValueError where the file has one that is not `wanted`; a warning, unless `quiet`, where it lacks one.
    """
    if wanted is None:
        return list(known), list(ids)
    id_of, names = dict(zip(known, ids)), list(wanted)
    unknown, missing = sorted(set(id_of) - set(names)), [title for title in names if title not in id_of]
    if unknown:
        raise ValueError(
            f"{name}: categories {unknown} are not among those of the training set or model, {names}; "
            "categories are matched by name"
        )
    if missing and not quiet:
        logger.warning("%s: has no categories %s; nothing of them will be found here", name, missing)
    return names, [id_of.get(title) for title in names]


def _read_keypoint_names(name: str, records: list) -> list[str]:
    found = [record["keypoints"] for record in records if record.get("keypoints")]
    right = found and all(names == found[0] for names in found) and isinstance(found[0], list)
    if not right or not all(isinstance(title, str) for title in found[0]):
        raise ValueError(
            f"{name}: categories: 'keypoints' must be one list of names, there are {found}; "
            "data.keypoints=false leaves keypoints out"
        )
    return found[0]


def _count_keypoints(content: Mapping) -> int:
    """How many keypoints most objects have."""
    lists = [a.get("keypoints") for a in content["annotations"] if isinstance(a, dict)]
    counts = Counter(len(points) // 3 for points in lists if isinstance(points, (list, tuple)) and points)
    return counts.most_common(1)[0][0] if counts else 0


# -------------------------------------------------------------------------------------------------------------- records


class _Image(NamedTuple):
    id: int
    file_name: str
    height: int
    width: int
    negative: list[int]  # LVIS's lists, as labels
    unsure: list[int]
    series: str | None = None


class Mask(NamedTuple):
    """A segmentation: polygons [n, 2] float64 that add up, or run lengths in both forms."""

    size: tuple[int, int]  # height, width; 0, 0 where nothing tells
    polygons: list[np.ndarray]
    extent: np.ndarray | None = None  # x1, y1, x2, y2 of the polygons
    runs: np.ndarray | None = None
    counts: bytes = b""

    def bounds(self) -> tuple[float, float, float, float]:
        """x, y, width, height."""
        if self.runs is not None:
            return tuple(rle_tools.toBbox(self.rle()).tolist())
        x1, y1, x2, y2 = self.extent.tolist()
        return x1, y1, x2 - x1, y2 - y1

    def area(self) -> float:
        """Number of pixels; 0 for polygons on an image of unknown size."""
        return float(rle_tools.area(self.rle())) if self.size[0] else 0.0

    def rle(self) -> dict:
        """As compressed run lengths."""
        if self.runs is not None:
            return {"size": list(self.size), "counts": self.counts}
        parts = rle_tools.frPyObjects([polygon.ravel().tolist() for polygon in self.polygons], *self.size)
        return rle_tools.merge(parts)


class _Learnt(NamedTuple):
    """What training sees of an object."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2, clipped
    rings: list[np.ndarray]
    even_odd: bool


class _Object(NamedTuple):
    image: int  # row
    id: int
    label: int
    box: tuple[float, float, float, float]  # x, y, width, height
    area: float
    crowd: bool
    ignored: bool
    mask: Mask | None
    keypoints: list[float]
    num_keypoints: int
    track: Any
    learnt: _Learnt | None


NOT_LEARNT = "nothing is learnt from it, but evaluation counts it as an object to be found, as COCO does"
ALWAYS = ("image", "id", "label", "crowd", "keypoints")  # the columns that are kept of objects
LEARNT = ("learnt", "learnt_box", "even_odd", "learnt_rings", "learnt_points")
TRUTH = ("box", "area", "ignored", "num_keypoints", "track", "rings", "points", "runs")
NO_MASK = "segmentation without a polygon of at least three points, no mask for the object"
LESS_MASK = "polygon of fewer than three points or of an odd number of coordinates, left out"


class _Reader:
    """Reads the records of a file; max_pixels is None where the pictures themselves are of no interest.

    Records that are written as COCO's and hold nothing to be told (see plain.py) are read many at a time, the others
    one by one, all in the order of the file: what is told does not depend on which is which.
    """

    def __init__(
        self,
        problems: Problems,
        classes: _Classes,
        masks: bool,
        num_keypoints: int,
        max_pixels: int | None,
        truth: bool,
    ):
        self.problems, self.classes, self.masks, self.num_keypoints = problems, classes, masks, num_keypoints
        self.max_pixels, self.learning, self.truth = max_pixels, max_pixels is not None, truth
        self.label_of = {id_: label for label, id_ in enumerate(classes.ids, 1)}
        self.federated = False
        self.images, self.objects, self.boxes_seen = Columns(), Columns(), Boxes()
        self.series, self.tracks = Codes(), Codes()
        self.images.append(_block_of([], self.series), 0)
        self.objects.append(self._kept(self._columns([])), 0)
        self.num_learnt = self.num_learnt_crowds = 0
        self.maskless, self.crowds, self.any_mask = Places(), Places(), False
        self.attributes: AttributeReader | None = None  # where they are wanted,
        self.said: list[Said] = []  # and what each object says of them

    def read(self, content: Mapping) -> None:
        wrong = self._read_images(content["images"])
        self.image_ids, self.sizes = self.images.take("id"), self.images.take("size")
        self._rows = Rows(self.image_ids)
        seen = Seen()
        for block in blocks_of(content["annotations"]):
            self._read_objects(block, seen, wrong)
        if self.learning and self.masks and self.any_mask:
            kind = "object without a segmentation, whose mask is neither learnt nor measured"
            self.problems.notices(kind, self.maskless)
        self.groups = self.attributes.groups(self.said) if self.attributes else []
        said: Sequence = self.said if self.attributes else range(self.objects.length)
        self.codes = encode(said, self.groups, self.problems.notice)
        if self.learning and self.crowds.count > MANY_CROWDS * self.objects.length:
            count = self.objects.length
            kind = f"crowd region (iscrowd: 1) among only {count} objects: neither learnt from nor to be found"
            self.problems.notices(kind, self.crowds)

    # ------------------------------------------------------------------------------------------------------- images

    def _read_images(self, records: Sequence) -> set[int]:
        """Fills `images`; returns the ids of wrong records."""
        names, ids, wrong = Seen(), Seen(), set()
        self.federated = bool(len(records))
        for block in blocks_of(records):
            found = plain_images(block.data, self.max_pixels) if isinstance(block.data, bytes) else None
            hashes = np.array([hash(name) for name in found.names] if found and self.learning else [], np.int64)
            if (
                found is None
                or len({*found.ids.tolist()}) < block.count
                or len({*hashes.tolist()}) < len(hashes)
                or ids.has(found.ids).any()
                or names.has(hashes).any()
            ):
                images = self._read_one_by_one(block, ids, names, wrong)
                columns = _block_of(images, self.series)
                hashes = np.array([hash(image.file_name) for image in images], np.int64)
            else:
                self.federated &= found.listed
                columns = found.columns(self.label_of, self.federated, self.series)
            ids.add(columns["id"])
            names.add(hashes)
            self.images.append(columns, len(columns["id"]))
        return wrong

    def _read_one_by_one(self, block: Block, ids: Seen, names: Seen, wrong: set[int]) -> list[_Image]:
        """The images of a block; ids and names: of the blocks before. Names are told apart by 64 bits of their hash."""
        records = list(block.load().values())
        values = [whole(record.get("id")) if isinstance(record, dict) else None for record in records]
        texts = [record.get("file_name") if isinstance(record, dict) else None for record in records]
        known = _among(ids, [value for value in values if value is not None])
        taken = _among(names, [hash(text) for text in texts if isinstance(text, str)])
        before, found = self._images_before(known), {}
        for number, record in enumerate(records, block.first):
            self.federated &= isinstance(record, dict) and isinstance(record.get("neg_category_ids"), list)
            id_ = self._whole(record, "id", f"images[{number}]") if isinstance(record, dict) else None
            if id_ is None:
                self.problems.error("image without an integer id", f"images[{number}]={_short(record)}")
                continue
            image = self._read_image(record, id_)
            if image is None:
                wrong.add(id_)
                continue
            other = found.get(id_) or before.get(id_)
            if other and image[:4] == other[:4]:
                self.problems.notice("image that is listed twice, taken once", f"image {id_}")
            elif other:
                where = f"image {id_} file_name={image.file_name!r} and {other.file_name!r}"
                self.problems.error("duplicate image id", where)
            else:
                if hash(image.file_name) in taken and self.learning:
                    self.problems.notice("file_name used by two images", f"image {id_} file_name={image.file_name!r}")
                taken.add(hash(image.file_name))
                found[id_] = image
        return list(found.values())

    def _images_before(self, ids: set[int]) -> dict[int, _Image]:
        found, wanted = {}, np.array(sorted(ids), np.int64)
        columns = (self.images.blocks[name] for name in ("id", "size", "names", "names_counts")) if ids else ()
        for own, sizes, names, counts in zip(*columns):
            for row in np.flatnonzero(np.isin(own, wanted)).tolist():
                end = int(counts[: row + 1].sum())
                name = names[end - int(counts[row]) : end].tobytes().decode()
                found[int(own[row])] = _Image(int(own[row]), name, *sizes[row].tolist(), [], [])
        return found

    def _read_image(self, record: dict, id_: int) -> _Image | None:
        where, name = f"image {id_}", record.get("file_name")
        size = f"height={record.get('height')!r} width={record.get('width')!r}"
        height, width = (self._whole(record, key, where) for key in ("height", "width"))
        lists = [self._lvis_list(record, key) for key in ("neg_category_ids", "not_exhaustive_category_ids")]
        known = height is not None and width is not None and 0 < height < 2**31 and 0 < width < 2**31
        series = series_of(name if isinstance(name, str) else "", record.get("series"), record.get("video_id"))
        if not self.learning:
            name = name if isinstance(name, str) and _is_text(name) else ""
            return _Image(id_, name, *((height, width) if known else (0, 0)), *lists, series)
        if not isinstance(name, str) or not name or not _is_text(name):
            return self.problems.error("image without a file_name", f"{where} file_name={name!r}")
        if not (height and width and height > 0 and width > 0):
            return self.problems.error("image without a size", f"{where} {size}")
        if height * width > self.max_pixels or not known:
            return self.problems.error(f"image over data.max_pixels={self.max_pixels}", f"{where} {width} x {height}")
        return _Image(id_, name, height, width, *lists, series)

    def _lvis_list(self, record: dict, key: str) -> list[int]:
        values = record.get(key) if self.federated else []
        ids = map(whole, values) if isinstance(values, list) else []
        return [self.label_of[id_] for id_ in ids if id_ in self.label_of]

    def pack(self, labels: Sequence[int] = ()) -> tuple[Truth | None, dict[str, np.ndarray]]:
        """The truth, where it was asked for, and the arrays of `Annotations`; labels: the label there of each category
        of the file. Once: the reader's columns are let go."""
        objects = self.objects
        image = objects.take("image")
        order = order_of(image)
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        starts = starts_of(np.bincount(image, minlength=len(self.image_ids)))
        images = np.arange(len(self.image_ids))
        names, name_starts = self.images.take_lists("names", images)
        pictures = {
            "image_ids": self.image_ids,
            "image_sizes": self.sizes,
            "file_names": names,
            "file_name_starts": name_starts,
            "sources": np.zeros(len(images), np.int32),
        }
        ids, label, crowd = (objects.take(name, places) for name in ("id", "label", "crowd"))
        keypoints = objects.take("keypoints", places)
        attributes = {"attribute_groups": self.groups, "attributes": self.codes[order]}
        truth, arrays = None, {}
        if self.learning:
            learnt = objects.take("learnt", places)
            arrays = pictures | self._pack_learnt(places, image[order], ids, label, crowd, keypoints, labels, learnt)
            arrays |= attributes | {"attributes": attributes["attributes"][learnt]}
        if self.truth:
            lists = {}
            for key in ("negative", "unsure"):
                values, first = self.images.take_lists(key, images)
                lists |= {key: values, f"{key}_starts": first} if self.federated else {
                    key: values[:0], f"{key}_starts": np.zeros_like(first)}  # fmt: skip
            rings, ring_starts = objects.take_lists("rings", places)
            runs, run_starts = objects.take_lists("runs", places)
            truth = Truth(
                **pictures,
                **lists,
                categories=self.classes.names,
                category_ids=list(self.classes.ids),
                frequencies=self.classes.frequencies,
                federated=self.federated,
                object_starts=starts,
                object_ids=ids,
                labels=label,
                boxes=objects.take("box", places),
                areas=objects.take("area", places),
                crowd=crowd,
                ignored=objects.take("ignored", places),
                ring_starts=ring_starts,
                point_starts=starts_of(rings),
                points=objects.take_lists("points", places)[0],
                run_starts=run_starts,
                runs=runs,
                keypoints=keypoints,
                num_keypoints=objects.take("num_keypoints", places),
                series=self.images.take("series"),
                tracks=objects.take("track", places),
                **attributes,
            )
        return truth, arrays

    def _pack_learnt(
        self,
        places: np.ndarray,
        image: np.ndarray,
        ids: np.ndarray,
        label: np.ndarray,
        crowd: np.ndarray,
        keypoints: np.ndarray,
        labels: Sequence[int],
        learnt: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """The objects of `Annotations`. image, ids, label, crowd, keypoints, learnt: of all objects, in their last
        order."""
        objects = self.objects
        keep = slice(None) if learnt.all() else learnt
        rings, ring_starts = objects.take_lists("learnt_rings", places)
        starts = starts_of(np.bincount(image[keep], minlength=len(self.image_ids)))
        points = objects.take_lists("learnt_points", places)[0]
        seen = keypoints[keep].astype(np.float32)
        seen[..., :2] += 0.5  # COCO's keypoints are indices of pixels
        return {
            "object_starts": starts,
            "object_ids": ids[keep],
            "boxes": objects.take("learnt_box", places)[keep],
            "labels": np.array([0, *labels], np.int32)[label[keep]],
            "crowd": crowd[keep],
            "even_odd": objects.take("even_odd", places)[keep],
            "ring_starts": starts_of(np.diff(ring_starts)[keep]),
            "point_starts": starts_of(rings),
            "points": points,
            "keypoints": seen,
        }

    # ------------------------------------------------------------------------------------------------------ objects

    def _read_objects(self, block: Block, seen: Seen, wrong: set[int]) -> None:
        """Reads the annotations of a block."""
        own, has_id = np.zeros(block.count, np.int64), np.zeros(block.count, bool)
        rows, plain = np.zeros(0, np.int64), None
        if isinstance(block.data, bytes) and not self.num_keypoints and not self.attributes:
            where = self._rows.of, self.sizes, self.classes.ids
            rows, plain = plain_objects(block.data, self.masks, *where, self.learning, self.tracks)
            own[rows], has_id[rows] = plain["id"], True
        others = np.ones(block.count, bool)
        others[rows] = False
        records = block.load(np.flatnonzero(others))
        for row, record in records.items():
            if isinstance(record, dict) and (id_ := whole(record.get("id"))) is not None:
                own[row], has_id[row] = id_, True
        again = np.zeros(block.count, bool)
        again[has_id] = seen.add(own[has_id])
        if again[rows].any():
            records = dict(sorted((records | block.load(rows[again[rows]])).items()))
            rows, plain = rows[~again[rows]], chosen(plain, ~again[rows])
        items, places, maskless, crowds = [], [], {}, {}
        for row, record in records.items():
            number = block.first + row
            if not isinstance(record, dict):
                self.problems.error("annotation that is no object", f"annotations[{number}]={_short(record)}")
                continue
            where = f"annotation {own[row]}" if has_id[row] else f"annotations[{number}]"
            if not has_id[row]:
                self.problems.notice("annotation without an id of its own, numbered", where)
            elif again[row]:
                where += f" (annotations[{number}])"
                self.problems.notice("annotation id that occurs twice, numbered", where)
            item = self._read_object(record, where, int(own[row]) if has_id[row] else number, wrong)
            if item is None:
                continue
            items.append(item)
            places.append(row)
            if self.attributes:
                self.said.append(self.attributes.read(record, where))
            if not item.crowd and item.mask is None and not record.get("segmentation"):
                maskless[row] = where
            if item.crowd:
                crowds[row] = where
        columns, places = self._columns(items), np.array(places, np.int64)
        is_crowd, is_maskless = np.zeros((2, 0), bool)
        if plain is not None:
            is_crowd = plain["crowd"]
            is_maskless = ~is_crowd & (plain["rings_counts"] == 0)
            columns = interleave(plain, columns, np.argsort(np.concatenate([rows, places]))) if items else plain
        _note(self.maskless, maskless, rows[is_maskless], own)
        _note(self.crowds, crowds, rows[is_crowd], own)
        has_mask = (columns["rings_counts"] > 0) | (columns["runs_counts"] > 0)
        self.any_mask |= bool((has_mask & ~columns["crowd"]).any())
        if self.learning:
            self.boxes_seen.add(columns["box"], self.sizes[columns["image"]])
        self.num_learnt += int(columns["learnt"].sum())
        self.num_learnt_crowds += int((columns["learnt"] & columns["crowd"]).sum())
        self.objects.append(self._kept(columns), len(columns["id"]))

    def _columns(self, items: list[_Object]) -> dict[str, np.ndarray]:
        """Objects that were read one by one, as a block of columns."""
        masks = [item.mask or Mask((0, 0), []) for item in items]
        learnt = [item.learnt or _Learnt((0, 0, 0, 0), [], False) for item in items]
        shape = (len(items), self.num_keypoints, 3)
        columns = {
            "image": np.array([item.image for item in items], np.int32),
            "id": np.array([item.id for item in items], np.int64),
            "label": np.array([item.label for item in items], np.int32),
            "box": np.array([item.box for item in items], np.float64).reshape(-1, 4),
            "area": np.array([item.area for item in items], np.float64),
            "crowd": np.array([item.crowd for item in items], bool),
            "ignored": np.array([item.ignored for item in items], bool),
            "keypoints": np.array([item.keypoints for item in items], np.float64).reshape(shape),
            "num_keypoints": np.array([min(item.num_keypoints, 2**31 - 1) for item in items], np.int32),
            "track": self.tracks.of([item.track for item in items]),
            "learnt": np.array([item.learnt is not None for item in items], bool),
            "learnt_box": np.array([item.box for item in learnt], np.float32).reshape(-1, 4),
            "even_odd": np.array([item.even_odd for item in learnt], bool),
        }
        lists = (
            ("", [mask.polygons for mask in masks], np.float64),
            ("learnt_", [i.rings for i in learnt], np.float32),
        )
        for name, groups, dtype in lists:
            rings = [ring for group in groups for ring in group]
            columns[f"{name}rings"], columns[f"{name}rings_counts"] = counts_of(rings), counts_of(groups)
            columns[f"{name}points"] = np.concatenate([np.zeros((0, 2), dtype), *rings], dtype=dtype)
            columns[f"{name}points_counts"] = np.array([sum(map(len, group)) for group in groups], np.int32)
        columns["runs"] = np.frombuffer(b"".join(mask.counts for mask in masks), np.uint8)
        columns["runs_counts"] = counts_of([mask.counts for mask in masks])
        return columns

    def _kept(self, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Those of the columns that the result has."""
        kept = set(ALWAYS)
        kept |= set(LEARNT if self.learning else ()) | set(TRUTH if self.truth else ())
        return {name: values for name, values in columns.items() if name.removesuffix("_counts") in kept}

    def _read_object(self, record: dict, where: str, own: int, wrong: set[int]) -> _Object | None:
        """One checked annotation, or None with the reason in `problems`; wrong: ids of images that were reported."""
        problems = self.problems
        image_id = self._whole(record, "image_id", where)
        row = -1 if image_id is None else int(self._rows.of(np.array([image_id]))[0])
        if row < 0:
            if image_id is None or image_id not in wrong:
                problems.error("unknown image_id", f"{where} image_id={_short(record.get('image_id'))}")
            return None
        size = tuple(self.sizes[row].tolist())
        category_id = self._whole(record, "category_id", where)
        if category_id not in self.label_of:
            return problems.error("unknown category_id", f"{where} category_id={_short(record.get('category_id'))}")
        crowd = flag(record.get("iscrowd"))
        if crowd is None:
            return problems.error("iscrowd is not 0 or 1", f"{where} iscrowd={_short(record['iscrowd'])}")
        if type(record.get("iscrowd", 0)) is not int:
            problems.notice(
                "iscrowd that is not written as 0 or 1, read as such", f"{where} iscrowd={_short(record['iscrowd'])}"
            )

        bbox = record.get("bbox")
        no_box = bbox is None or (isinstance(bbox, list) and not bbox)
        area = number(record.get("area"))
        mask, segmentation = None, record.get("segmentation")
        no_area = area is None or area <= 0
        if segmentation is not None and (self.masks or no_box or no_area):
            try:
                mask = read_mask(segmentation, size, partial(problems.notice, where=where))
            except OtherSize as error:
                if self.masks or no_box:
                    return problems.error("mask of another size", f"{where} {error}")
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                if self.masks or no_box:
                    return problems.error("wrong segmentation", f"{where} segmentation: {error}")
        if mask is not None and not size[0]:  # run lengths tell the size
            size = mask.size
            self.sizes[row] = size
        if no_box and mask is not None:
            box = mask.bounds()
            problems.notice("no bbox, taken from the segmentation", where)
        elif (box := self._read_box(bbox, where)) is None:
            return problems.error("bbox is not four finite numbers", f"{where} bbox={_short(bbox)}")
        if not segmentation and (turned := _turned(record, box)) is not None:
            kind = "box that CVAT turned (attributes.rotation), read as its outline and the upright box around it"
            problems.notice(kind, f"{where} rotation={_short(record['attributes']['rotation'])}")
            mask = Mask(size, [turned], np.concatenate([turned.min(0), turned.max(0)]))
            box = mask.bounds()
        if no_area:
            area = (mask.area() if mask else 0.0) or box[2] * box[3]
            value = f"area={_short(record['area'])}" if "area" in record else "no area"
            problems.notice("area that is no positive number, taken from the mask or the box", f"{where} {value}")
        elif isinstance(record["area"], str):
            problems.notice("area written as text, read as a number", f"{where} area={record['area']!r}")
        keypoints, num_keypoints = self._read_keypoints(record, where) if self.num_keypoints else ([], 0)
        if keypoints is None:
            return None
        mask = mask if self.masks else None
        learnt = self._learnt(box, mask, crowd, size, where, box if no_box else bbox) if self.learning else None
        ignored = bool(flag(record.get("ignore")))
        label, track = self.label_of[category_id], record.get("track_id")
        return _Object(row, own, label, box, area, crowd, ignored, mask, keypoints, num_keypoints, track, learnt)

    def _whole(self, record: dict, key: str, where: str) -> int | None:
        """`whole` of a field, with a notice where it is not written as a whole number."""
        value = record.get(key)
        read = whole(value)
        if read is not None and not isinstance(value, (int, np.integer)):
            self.problems.notice("number that is not written as a whole one, read as such", f"{where} {key}={value!r}")
        return read

    def _read_box(self, bbox: Any, where: str) -> tuple[float, float, float, float] | None:
        """x, y, width and height; a box that was drawn backwards is turned round. None where there is none."""
        if not isinstance(bbox, (list, tuple, np.ndarray)) or len(bbox) != 4:
            return None
        box = [number(value) for value in bbox]
        if None in box:
            return None
        x, y, width, height = box
        if any(isinstance(value, str) for value in bbox):
            self.problems.notice("bbox written as text, read as numbers", f"{where} bbox={_short(bbox)}")
        if width < 0 or height < 0:
            self.problems.notice("bbox of negative size, turned round", f"{where} bbox={_short(bbox)}")
            x, y, width, height = min(x, x + width), min(y, y + height), abs(width), abs(height)
        return (x, y, width, height) if math.isfinite(x + width) and math.isfinite(y + height) else None

    def _read_keypoints(self, record: dict, where: str) -> tuple[list[float] | None, int]:
        """x, y, visibility of each keypoint, and how many count; None instead where they are wrong."""
        points = record.get("keypoints") or [0] * 3 * self.num_keypoints
        if not (
            isinstance(points, (list, tuple))
            and len(points) == 3 * self.num_keypoints
            and all(map(_is_finite, points))
            and set(points[2::3]) <= {0, 1, 2}
        ):
            what = f"keypoints are not {self.num_keypoints} times x, y and visibility 0, 1 or 2"
            self.problems.error(what, f"{where} keypoints={_short(points)}")
            return None, 0
        count = whole(record.get("num_keypoints"))
        return list(points), sum(v > 0 for v in points[2::3]) if count is None or count < 0 else count

    def _learnt(
        self, box: tuple, mask: Mask | None, crowd: bool, size: Sequence[int], where: str, bbox: Any
    ) -> _Learnt | None:
        """What is learnt from an object; None where its box holds nothing of the image."""
        x1, y1, w, h = box
        x2, y2, (height, width) = x1 + w, y1 + h, size
        if w < EDGE or h < EDGE:
            return self.problems.notice(f"bbox of no size: {NOT_LEARNT}", f"{where} bbox={_short(bbox)}")
        if x1 > width - EDGE or y1 > height - EDGE or x2 < EDGE or y2 < EDGE:
            return self.problems.notice(f"bbox outside the image: {NOT_LEARNT}", f"{where} bbox={_short(bbox)}")
        if x1 < -OUT or y1 < -OUT or x2 > width + OUT or y2 > height + OUT:  # less is rounding
            where = f"{where} bbox={_short(bbox)} of {width} x {height}"
            self.problems.notice("bbox reaches out of the image, clipped", where)
        rings, even_odd = [], False
        if mask is not None and not crowd:
            if mask.runs is not None:
                rings, even_odd = run_rings(mask.runs, height), True
            else:
                left, top, right, bottom = mask.extent.astype(np.float32).tolist()
                if min(right, width) > max(left, 0) and min(bottom, height) > max(top, 0):
                    rings = [polygon.astype(np.float32) for polygon in mask.polygons]
            if not rings:
                self.problems.notice("segmentation without an area, box kept", where)
        return _Learnt((max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)), rings, even_odd)


def _turned(record: dict, box: tuple[float, float, float, float]) -> np.ndarray | None:
    """The corners [4, 2] of a box that CVAT's COCO export gives as it was before it was turned about its centre; None
    where it was not. The angle is clockwise, in degrees."""
    attributes = record.get("attributes")
    angle = number(attributes.get("rotation")) if isinstance(attributes, dict) else None
    if not angle or not angle % 360:
        return None
    x, y, w, h = box
    sine, cosine = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    corners = np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2
    return corners @ np.array([[cosine, sine], [-sine, cosine]]) + [x + w / 2, y + h / 2]


class OtherSize(ValueError):
    """A mask of another size than its image."""


def read_mask(segmentation: Any, size: Sequence[int], notice: Callable[[str], None]) -> Mask | None:
    """A segmentation as COCO or tools write it, on an image of `size` (height, width; 0, 0 where that is unknown).

    None where it holds nothing. notice: called with what is written in another way than COCO's, and read all the same.
    Raises OtherSize, and ValueError, TypeError, KeyError, AttributeError or OverflowError for what cannot be read.
    """
    if isinstance(segmentation, list) and len(segmentation) == 1 and isinstance(segmentation[0], dict):
        notice("run lengths in a list, read as such")
        segmentation = segmentation[0]
    if isinstance(segmentation, dict) and segmentation:
        own = segmentation.get("size")
        read = tuple(map(whole, own)) if isinstance(own, (list, tuple, np.ndarray)) else ()
        unknown = not size[0] and len(read) == 2 and None not in read and min(read) > 0
        if not unknown and read != tuple(size):
            raise OtherSize(f"size={_short(own)}, the image has {list(size)}")
        if not all(isinstance(value, (int, np.integer)) for value in own):
            notice("size of a mask that is not written as whole numbers, read as such")
        return _read_runs(segmentation["counts"], read, notice)
    if not isinstance(segmentation, (list, tuple)):
        if segmentation:
            raise ValueError(f"{_short(segmentation)} is neither polygons nor run lengths")
        return None
    return _read_polygons(segmentation, tuple(size), notice) if segmentation else None


def _read_runs(counts: Any, size: tuple[int, int], notice: Callable[[str], None]) -> Mask:
    if isinstance(counts, str) and counts[:2] in ("b'", 'b"'):
        notice("run lengths that are bytes written as text, read as such")
        try:
            counts = ast.literal_eval(counts)
        except (SyntaxError, MemoryError, RecursionError):
            raise ValueError("counts is no compressed run-length string") from None
    if isinstance(counts, (list, tuple, np.ndarray)):
        kinds = set(map(type, counts))
        if kinds != {int}:
            counts = [whole(value) for value in counts]
        if None in counts:
            raise ValueError("counts must be a list of integers")
        if not all(issubclass(kind, (int, np.integer)) for kind in kinds):
            notice("run lengths that are not written as whole numbers, read as such")
        counts = list(counts)
    runs = rle_counts(counts, *size)
    if isinstance(counts, list):
        counts = rle_tools.frPyObjects({"size": list(size), "counts": counts}, *size)["counts"]
    return Mask(size, [], None, runs, counts.encode() if isinstance(counts, str) else counts)


def _read_polygons(segmentation: Sequence, size: tuple[int, int], notice: Callable[[str], None]) -> Mask | None:
    lists = (list, tuple, np.ndarray)
    nested = any(isinstance(value, lists) for value in segmentation)
    pairs = nested and all(isinstance(v, lists) and len(v) == 2 and not isinstance(v[0], lists) for v in segmentation)
    if pairs or not nested:
        notice("polygon that is not in a list, read as one")
        segmentation = [segmentation]
    polygons = []
    for polygon in segmentation:
        points = np.asarray(polygon, np.float64)
        if len(polygon) and isinstance(polygon[0], str):
            notice("polygon written as text, read as numbers")
        if points.ndim == 2 and points.shape[1] == 2:
            points = points.ravel()
            notice("polygon of pairs of numbers, read as one list")
        if points.ndim != 1 or not np.isfinite(points).all():
            raise ValueError(f"polygon {_short(polygon)} must be a flat list of finite x, y pairs")
        if len(points) >= 6 and len(points) % 2 == 0:
            polygons.append(points.reshape(-1, 2))
    if len(polygons) < len(segmentation):
        notice(LESS_MASK if polygons else NO_MASK)
    if not polygons:
        return None
    points = polygons[0] if len(polygons) == 1 else np.concatenate(polygons)
    extent = np.concatenate([points.min(0), points.max(0)])
    if size[0] and abs(extent).max() > FAR * max(size):  # takes the rasteriser's memory
        raise ValueError(f"polygons reach out of the image by more than {FAR} times its size")
    return Mask(size, polygons, extent)


# --------------------------------------------------------------------------------------------------------------- arrays


def _block_of(images: list[_Image], series: Codes) -> dict[str, np.ndarray]:
    ids, names, heights, widths, negative, unsure, named = zip(*images) if images else [()] * len(_Image._fields)
    sizes = np.stack([np.array(heights, np.int32), np.array(widths, np.int32)], axis=1)
    return image_columns(np.array(ids, np.int64), sizes, names, negative, unsure, series.of(named))


def _among(seen: Seen, values: Sequence[int]) -> set[int]:
    """Those of some whole numbers that came before."""
    values = np.array(values, np.int64)
    return set(values[seen.has(values)].tolist())


def _note(places: Places, named: dict[int, str], rows: np.ndarray, ids: np.ndarray) -> None:
    """Add the annotations of a block that are `named` by their row, and those of the `rows`, named by their ids [n]."""
    missing = SHOWN - len(places.examples)
    places.count += len(named) + len(rows)
    if missing > 0:
        named = named | {row: f"annotation {ids[row]}" for row in rows[:missing].tolist()}
        places.examples += [named[row] for row in sorted(named)][:missing]


# --------------------------------------------------------------------------------------------------------------- values


def whole(value: Any) -> int | None:
    """The whole number of 64 bits that a value stands for: 7, 7.0, "7" and "7.0"; None where it is none."""
    if type(value) is int:  # nearly always
        return value if -(2**63) <= value < 2**63 else None
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, str):
        match = WHOLE.fullmatch(value)
        value = int(match[1]) if match else None
    elif isinstance(value, (float, np.floating)):
        value = int(value) if value.is_integer() and abs(value) <= 2**53 else None
    elif isinstance(value, (int, np.integer)):
        value = int(value)
    else:
        return None
    return value if value is not None and -(2**63) <= value < 2**63 else None


def number(value: Any) -> float | None:
    """The finite number that a value stands for, text too; None where it is none."""
    if type(value) is float:  # nearly always
        return value if math.isfinite(value) else None
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    return float(value) if _is_finite(value) else None


def flag(value: Any) -> bool | None:
    """0 and 1 as numbers, text or truth values; None and what is missing are 0. Returns None for everything else."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("", "false", "true"):
        return value.strip().lower() == "true"
    read = whole(value)
    return bool(read) if read in (0, 1) else None


def _is_finite(value: Any) -> bool:
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def _is_text(value: str) -> bool:
    """Whether text can be written to a file: JSON can hold halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
