"""Label Studio's JSON and JSON-MIN: tasks whose regions are in hundredths of the picture's sides.

Rectangles (turned ones as outlines), polygons, ellipses and brush masks are read; other regions are counted and left
out. Of several annotations of a task, the ground truth is taken, or the newest; cancelled ones are none. A task without
an annotation is one that nobody has looked at, and left out; one whose annotation has no regions is without objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detector.data.file_names import SERVED
from detector.data.formats.common import Notes, only
from detector.data.formats.shapes import Instances, numbers
from detector.data.picture_files import image_suffixes
from detector.data.read_coco import read_json, whole

SIZE = ("original_width", "original_height")


def read_label_studio(source: Path, images: Path | None = None, notes: Notes | None = None) -> dict:
    """COCO instances of a JSON file, or of the one in a folder; images: by default `images` beside it, or its folder.

    Raises FileNotFoundError where there is none, ValueError for what cannot be read, by file, task, region and value.
    """
    notes = Notes() if notes is None else notes
    file = only(sorted(source.glob("*.json")), f"the JSON file in {source}") if source.is_dir() else source
    if file is None:
        raise FileNotFoundError(f"{source}: no JSON file; export the project from Label Studio as JSON")
    tasks = read_json(file)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise ValueError(f"{file}: must be a list of tasks: export the project from Label Studio as JSON")
    folder = file.parent / "images"
    found = Instances(images or (folder if folder.is_dir() else file.parent), notes)
    for number, task in enumerate(tasks):
        where = f"{file}: task {task.get('id', number)}"
        regions = _regions(task, where, notes)
        if regions is None:
            notes.add("task without an annotation, left out: nobody has looked at it", where)
            continue
        size = next(([r[key] for key in SIZE] for r in regions if all(key in r for key in SIZE)), [None, None])
        found.image(_picture(task, where), size, where)
        for place, region in enumerate(regions):
            _read_region(found, region, f"{where} region {region.get('id', place)}")
    return found.content()


def _regions(task: Mapping[str, Any], where: str, notes: Notes) -> list[dict] | None:
    """The results of a task, None where there is no annotation; those of JSON-MIN in the form of JSON's."""
    if "annotations" not in task and "completions" not in task:
        lists = [value for value in task.values() if isinstance(value, list)]
        values = [value for entries in lists for value in entries if isinstance(value, dict) and SIZE[0] in value]
        return [{"value": value, **{key: value[key] for key in SIZE}} for value in values] or None
    kept = [a for a in task.get("annotations", task.get("completions")) or [] if not a.get("was_cancelled")]
    if not kept:
        return None
    if len(kept) > 1:
        notes.add("task with several annotations, of which the ground truth or the newest is taken", where)
    kept = [a for a in kept if a.get("ground_truth")] or kept
    results = max(kept, key=lambda a: str(a.get("updated_at") or a.get("created_at") or "")).get("result")
    if not isinstance(results, list):
        raise ValueError(f"{where}: result is {results!r}, a list of regions is needed")
    # a region of the tags Rectangle and Labels comes twice: with its shape alone, and with the label
    named = {result.get("id") for result in results if _label(result) is not None}
    return [result for result in results if _label(result) is not None or result.get("id") not in named]


def _picture(task: Mapping[str, Any], where: str) -> str:
    """The file that a task shows, as a path without the server that has it."""
    data = task.get("data", task)
    texts = [data["image"]] if isinstance(data.get("image"), str) else [v for v in data.values() if isinstance(v, str)]
    for text in texts:
        path = SERVED.sub("", text).partition("?")[0].replace("\\", "/")
        if Path(path).suffix.lower() in image_suffixes():
            return path.lstrip("/")
    if isinstance(task.get("file_upload"), str):
        return task["file_upload"]
    raise ValueError(f"{where}: data={data!r} names no picture")


def _label(region: Mapping[str, Any]) -> str | None:
    """The first label of a region."""
    value = region.get("value")
    for key, names in value.items() if isinstance(value, dict) else ():
        if key.endswith("labels") and isinstance(names, list) and names:
            return names[0]
    return None


def _read_region(found: Instances, region: Mapping[str, Any], where: str) -> None:
    value, name = region.get("value"), _label(region)
    if not isinstance(value, dict) or name is None or not {"points", "rle", "radiusX", "width"} & value.keys():
        kind = region.get("type", "region")
        return found.notes.add(f"{kind} left out: it has no label, or is no box, polygon, ellipse or mask", where)
    if region.get("image_rotation"):
        raise ValueError(
            f"{where}: image_rotation={region['image_rotation']}: turn the picture itself, and label it anew"
        )
    scale = np.array(found.size) / 100
    angle = numbers([value.get("rotation") or 0], f"{where} rotation", 1)[0]
    if "rle" in value:
        return found.mask(name, _brush(value["rle"], found.size, where), where)
    if "points" in value:
        points = [np.array(numbers(point, where, 2)) * scale for point in value["points"]]
        return found.outline(name, [points], where)
    corner = np.array(numbers([value.get("x"), value.get("y")], where, 2)) * scale
    keys = ("radiusX", "radiusY") if "radiusX" in value else ("width", "height")
    extent = np.array(numbers([value.get(key) for key in keys], where, 2)) * scale
    if "radiusX" in value:
        return found.ellipse(name, corner, extent, where, angle)
    return found.box(name, [*corner, *(corner + extent)], where, angle, pivot="corner")


def _brush(data: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """The mask [h, w] bool of a brush: four channels in bit-packed run lengths (the npm package rle-pack).

    32 bits: how many values. 5: bits of a value, less 1. Four times 4: bits of a length, less 1. Then runs, each of 1
    bit: is it one value repeated? 2 bits: which of the four lengths' sizes; the length, less 1; the value or values.
    """
    bytes_ = [whole(value) for value in data] if isinstance(data, list) else [None]
    if None in bytes_ or not all(0 <= value < 256 for value in bytes_):
        raise ValueError(f"{where}: rle must be a list of bytes")
    bits = _Bits(np.unpackbits(np.array(bytes_, np.uint8)))
    try:
        count, depth = bits.read(32), bits.read(5) + 1
        sizes = [bits.read(4) + 1 for _ in range(4)]
        width, height = size
        if count != 4 * width * height:
            raise ValueError(
                f"{where}: rle has {count} values, the picture of {width} x {height} has {4 * width * height}"
            )
        parts, done = [], 0
        while done < count:
            repeated = bits.read(1)
            length = bits.read(sizes[bits.read(2)]) + 1
            parts += [(bits.read(depth), length)] if repeated else [(bits.read(depth), 1) for _ in range(length)]
            done += length
    except IndexError:
        raise ValueError(f"{where}: rle is cut short") from None
    values, lengths = np.array(parts).T
    return np.repeat(values, lengths)[:count].reshape(height, width, 4)[..., 3] > 0


class _Bits:
    def __init__(self, bits: np.ndarray):
        self.bits, self.at = bits, 0

    def read(self, count: int) -> int:
        part = self.bits[self.at : self.at + count]
        if len(part) < count:
            raise IndexError
        self.at += count
        return int("".join(map(str, part)), 2)
