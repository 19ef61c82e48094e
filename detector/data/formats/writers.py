"""COCO instances, or what a model found, in the formats of other tools: YOLO, CVAT, Label Studio, CSV, COCO's polygons.

Own code but for CVAT: hotcoco's to_yolo writes boxes only and takes images of one name in two folders for the same; its
to_cvat is right once every object has one polygon.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import hotcoco
import numpy as np
import yaml

from detector.checkpoint import write_json
from detector.data.formats.common import Notes, read_text
from detector.data.outlines import run_rings
from detector.data.read_coco import OtherSize, read_json, read_mask

TOLERANCE = 0.5  # pixels by which an outline may leave its mask: without its stairs it has far fewer points


def load_found(source: Path, annotations: Path | None = None, images: Path | None = None, score: float = 0) -> dict:
    """COCO instances to be written: a file of annotations, predictions.json of `detector predict`, or that of
    `detector eval`, whose images and categories are in the file `annotations`.

    images: the folder from which file names are to start, where they begin with it. score: the least of a detection.

    Raises FileNotFoundError and ValueError.
    """
    content = read_json(source)
    if isinstance(content, list):
        if annotations is None:
            raise ValueError(
                f"{source} is a list of results: give --annotations, the file with their images and categories"
            )
        about = read_json(annotations)
        content = {key: about.get(key) for key in ("images", "categories")} | {"annotations": content}
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(value, list) for value in lists):
        raise ValueError(f"{source}: 'images', 'annotations' and 'categories' must be lists: not COCO")
    pictures, entries, categories = lists
    ids = [{record.get("id") for record in records} for records in (pictures, categories)]
    for number, entry in enumerate(entries):
        for key, known in zip(("image_id", "category_id"), ids):
            if entry.get(key) not in known:
                raise ValueError(f"{source}: annotations[{number}]: {key}={entry.get(key)!r} is unknown")
    if images is not None:
        pictures = [p | {"file_name": _below(str(p["file_name"]), images)} for p in pictures]
    kept = [entry for entry in entries if entry.get("score", 1) >= score]
    return content | {"images": pictures, "annotations": kept}


def _below(name: str, folder: Path) -> str:
    path, top = os.path.abspath(name), os.path.abspath(folder)
    return Path(os.path.relpath(path, top)).as_posix() if path.startswith(os.path.join(top, "")) else name


def by_image(content: Mapping[str, Any]) -> Iterator[tuple[dict, list[dict]]]:
    """Each image with its annotations."""
    entries: dict[Any, list[dict]] = {image["id"]: [] for image in content["images"]}
    for entry in content["annotations"]:
        entries[entry["image_id"]].append(entry)
    for image in content["images"]:
        yield image, entries[image["id"]]


# ------------------------------------------------------------------------------------------------------------- polygons


def polygon_of(entry: Mapping[str, Any], image: Mapping[str, Any], tolerance: float = TOLERANCE) -> np.ndarray | None:
    """The outline [n, 2] of an object as one polygon; None where it has no mask.

    Parts and holes are joined by bridges of no width, so that what it encloses, by the even-odd rule, stays the same.
    """
    where = f"annotation {entry.get('id')} of image {image['id']}"
    size = (image.get("height", 0), image.get("width", 0))
    try:
        mask = read_mask(entry.get("segmentation"), size, lambda _: None)
    except (OtherSize, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where}: segmentation: {error}") from None
    if mask is None:
        return None
    if mask.runs is None and len(mask.polygons) == 1:
        return mask.polygons[0]
    if mask.runs is None and size[0]:  # parts may overlap, and they add up
        whole = read_mask(mask.rle(), size, lambda _: None)
        separate = sum(abs(_area(part)) for part in mask.polygons)
        if abs(separate - whole.area()) > 0.02 * separate + 2:
            mask = whole
    rings = mask.polygons if mask.runs is None else run_rings(mask.runs, size[0])
    if mask.runs is not None:
        rings = [_simple(np.asarray(ring, np.float32), tolerance) for ring in rings]
    return _bridged(rings) if rings else None


def _simple(ring: np.ndarray, tolerance: float) -> np.ndarray:
    """A ring of fewer points that stays as near; one that would vanish stays as it is."""
    found = cv2.approxPolyDP(ring[:, None], tolerance, True)[:, 0] if tolerance else ring
    return found if len(found) >= 3 and _area(found) * _area(ring) > 0 else ring


def _area(ring: np.ndarray) -> float:
    x, y = ring.astype(np.float64).T
    return float((np.roll(x, 1) * y - x * np.roll(y, 1)).sum() / 2)


def _bridged(rings: Sequence[np.ndarray]) -> np.ndarray:
    """One closed path through all rings, the largest first; every other is entered and left at the points that are
    nearest."""
    first, *others = sorted(rings, key=lambda ring: -abs(_area(ring)))
    path = np.asarray(first, np.float64)
    for ring in others:
        gaps = ((path[:, None] - ring[None]) ** 2).sum(2)
        at, start = np.unravel_index(gaps.argmin(), gaps.shape)
        turn = np.roll(ring, -start, axis=0)
        path = np.concatenate([path[: at + 1], turn, turn[:1], path[at:]])
    return path


def with_polygons(content: Mapping[str, Any], tolerance: float = TOLERANCE) -> dict:
    """The same with a polygon in the place of every segmentation."""
    entries = []
    for image, own in by_image(content):
        for entry in own:
            polygon = polygon_of(entry, image, tolerance)
            fields = {} if polygon is None else {"segmentation": [[round(v, 2) for v in polygon.ravel().tolist()]]}
            entries.append({key: value for key, value in entry.items() if key != "segmentation"} | fields)
    return {**content, "annotations": entries}


# --------------------------------------------------------------------------------------------------------------- files


def write_coco(content: Mapping[str, Any], target: Path, notes: Notes, tolerance: float = TOLERANCE) -> str:
    """COCO's JSON with polygons instead of run lengths."""
    write_json(target, with_polygons(content, tolerance))
    return f"{len(content['annotations'])} objects"


def write_csv(content: Mapping[str, Any], target: Path, notes: Notes) -> str:
    """A row for each object: file, its size, category, score, box."""
    names = {category["id"]: category["name"] for category in content["categories"]}
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file_name", "width", "height", "category", "score", "x", "y", "w", "h"])
    for image, entries in by_image(content):
        about = [image["file_name"], image.get("width"), image.get("height")]
        for entry in sorted(entries, key=lambda entry: -entry.get("score", 0)):
            score = f"{entry['score']:.4f}" if "score" in entry else ""
            rows.writerow([*about, names[entry["category_id"]], score, *(f"{v:.2f}" for v in entry["bbox"])])
    target.write_text(text.getvalue(), encoding="utf-8", newline="")
    return f"{len(content['annotations'])} rows"


def write_cvat(content: Mapping[str, Any], target: Path, notes: Notes) -> str:
    """CVAT for images 1.1, to be uploaded as annotations of a task with these pictures and labels."""
    kept = []
    for entry in with_polygons(content)["annotations"]:
        if entry.get("iscrowd"):
            notes.add("crowd region left out, CVAT has none", f"annotation {entry.get('id')}")
        else:
            kept.append({"area": 0, "iscrowd": 0} | entry | {"id": len(kept) + 1})
    with_score = sum("score" in entry for entry in kept)
    if with_score:
        notes.add("score left out, CVAT has no place for it: --score says from which on", f"{with_score} objects")
    kept = [{key: value for key, value in entry.items() if key != "score"} for entry in kept]
    counts = hotcoco.COCO({**content, "annotations": kept}).to_cvat(str(target))
    return f"{counts['boxes']} boxes and {counts['polygons']} polygons"


def write_label_studio(
    content: Mapping[str, Any],
    target: Path,
    notes: Notes,
    prefix: str = "/data/local-files/?d=",
    from_name: str = "label",
    to_name: str = "image",
) -> str:
    """Tasks with predictions, or where no object has a score with annotations, to be imported into Label Studio.

    prefix: what its server puts before the pictures' names. from_name, to_name: of the label tags and the image tag.
    """
    names = {category["id"]: category["name"] for category in content["categories"]}
    tasks, total = [], 0
    for image, entries in by_image(content):
        width, height = image["width"], image["height"]
        results = []
        for entry in entries:
            if entry.get("iscrowd"):
                notes.add("crowd region left out, Label Studio has none", f"annotation {entry.get('id')}")
                continue
            polygon = polygon_of(entry, image)
            kind = "rectanglelabels" if polygon is None else "polygonlabels"
            if polygon is None:
                x, y, w, h = entry["bbox"]
                value = {"x": 100 * x / width, "y": 100 * y / height, "rotation": 0}
                value |= {"width": 100 * w / width, "height": 100 * h / height}
            else:
                value = {"points": (100 * polygon / [width, height]).tolist(), "closed": True}
            total += 1
            result = {"id": f"object{total}", "type": kind, "from_name": from_name, "to_name": to_name}
            result |= {"original_width": width, "original_height": height, "image_rotation": 0}
            result["value"] = value | {kind: [names[entry["category_id"]]]}
            results.append(result | ({"score": entry["score"]} if "score" in entry else {}))
        scores = [result["score"] for result in results if "score" in result]
        found: dict[str, Any] = {"result": results}
        if scores:
            found |= {"model_version": "detector", "score": float(np.mean(scores))}
        is_found = any("score" in entry for entry in content["annotations"])
        task = {"data": {to_name: f"{prefix}{image['file_name']}"}}
        tasks.append(task | {"predictions" if is_found else "annotations": [found]})
    write_json(target, tasks)
    return f"{len(tasks)} tasks with {total} regions"


def write_yolo(
    content: Mapping[str, Any],
    target: Path,
    notes: Notes,
    images: Path | None,
    split: str = "train",
    boxes: bool = False,
) -> str:
    """labels/SPLIT and images/SPLIT below the folder `target`, and data.yaml, which may have other splits already.

    images: where the pictures are; they are linked, or copied where the file system has no links. boxes: leave outlines
    away; otherwise all objects are written as polygons as soon as one has an outline, as YOLO takes no mixture.

    Raises ValueError where a picture is missing or data.yaml has other names.
    """
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names, number = [c["name"] for c in categories], {c["id"]: i for i, c in enumerate(categories)}
    about = target / "data.yaml"
    settings = yaml.safe_load(read_text(about)) if about.is_file() else {"names": names}
    if not isinstance(settings, dict) or settings.get("names") != names:
        raise ValueError(f"{about} has other names than {names}: write into another folder")
    outlined = not boxes and any(entry.get("segmentation") for entry in content["annotations"])
    files: dict[Path, str] = {}
    for image, entries in by_image(content):
        source = None if images is None else images / image["file_name"]
        if source is None or not source.is_file():
            raise ValueError(
                f"image {image['id']}: {source or image['file_name']} is no file: give --images, its folder"
            )
        scale = np.array([image["width"], image["height"]], float)
        lines = []
        for entry in entries:
            where = f"annotation {entry.get('id')}"
            if entry.get("iscrowd"):
                notes.add("crowd region left out, YOLO has none", where)
                continue
            x, y, w, h = entry["bbox"]
            polygon = polygon_of(entry, image) if outlined else None
            if outlined and polygon is None:
                notes.add("object without an outline among others with one: its box is written as one", where)
                polygon = np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
            values = [(x + w / 2) / scale[0], (y + h / 2) / scale[1], w / scale[0], h / scale[1]]
            if polygon is not None:
                values = (polygon / scale).clip(0, 1).ravel().tolist()
            lines.append(" ".join([str(number[entry["category_id"]]), *(f"{value:.6f}" for value in values)]))
        label = (target / "labels" / split / image["file_name"]).with_suffix(".txt")
        if label in files:
            raise ValueError(f"image {image['id']}: {label} is of another image already: rename one of the pictures")
        files[label] = "".join(line + "\n" for line in lines)
        _link(source, target / "images" / split / image["file_name"])
    for label, text in files.items():
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(text, encoding="utf-8")
    settings[split] = f"images/{split}"
    about.write_text(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return f"{len(files)} images"


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
