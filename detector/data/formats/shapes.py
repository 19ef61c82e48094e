"""What the exports of annotation tools have in common: boxes, outlines and masks that become COCO instances.

Coordinates are continuous pixels, as COCO's polygons are: the first pixel reaches from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_tools

from detector.data.file_names import find_files
from detector.data.formats.common import Notes, fit, upright_size
from detector.data.read_coco import number

ELLIPSE_POINTS = 72


class Instances:
    """COCO instances that grow, image by image and object by object. folder: that of the pictures."""

    def __init__(self, folder: Path, notes: Notes):
        self.folder, self.notes = folder, notes
        self.names: dict[str, int] = {}
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def category(self, name: Any, where: str) -> int:
        """The id of a name."""
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{where}: label {name!r} is no name: give the object one in the tool")
        return self.names.setdefault(name.strip(), len(self.names) + 1)

    def image(self, file_name: str, size: Sequence[Any], where: str) -> None:
        """The image to which the next objects belong. size: width and height as they stand in a file."""
        width, height = (number(value) for value in size)
        if not (width and height and width > 0 and height > 0 and width % 1 == height % 1 == 0):
            path = self.folder / file_name
            if not path.is_file():
                raise ValueError(f"{where}: size {list(size)} is none, and {path} is not there to tell: give --images")
            width, height, _ = upright_size(path)
            self.notes.add("size taken from the picture", where)
        own = {"id": len(self.images) + 1, "file_name": file_name, "height": int(height), "width": int(width)}
        self.images.append(own)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the image at hand."""
        return self.images[-1]["width"], self.images[-1]["height"]

    def box(self, name: Any, corners: Sequence[Any], where: str, angle: float = 0, pivot: str = "centre") -> None:
        """An object with a box (x1, y1, x2, y2). One that is turned, by degrees clockwise about its centre or its first
        corner, becomes an outline."""
        x1, y1, x2, y2 = numbers(corners, where)
        x1, x2, y1, y2 = min(x1, x2), max(x1, x2), min(y1, y2), max(y1, y2)
        if angle % 360:
            self.notes.add("rotated box, kept as an outline; its box is the upright one around it", where)
            centre = ((x1 + x2) / 2, (y1 + y2) / 2) if pivot == "centre" else (x1, y1)
            return self.outline(name, [turned([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], angle, centre)], where)
        bbox = fit((x1, y1, x2, y2), *self.size, where, self.notes)
        self._add(name, {"bbox": bbox, "area": bbox[2] * bbox[3]}, where)

    def outline(self, name: Any, polygons: Sequence[Any], where: str) -> None:
        """An object with polygons, lists of points, that add up."""
        parts = []
        for polygon in polygons:
            points = np.array([numbers(point, where, 2) for point in polygon]).reshape(-1, 2)
            if len(points) < 3:
                self.notes.add("polygon of fewer than three points, left out", where)
            else:
                parts.append(points.clip(0, self.size))
        if not parts:
            return
        points = np.concatenate(parts)
        bbox = fit((*points.min(0), *points.max(0)), *self.size, where, self.notes)
        segmentation = [part.ravel().tolist() for part in parts]
        width, height = self.size
        area = float(rle_tools.area(rle_tools.merge(rle_tools.frPyObjects(segmentation, height, width))))
        self._add(name, {"bbox": list(map(float, bbox)), "area": area, "segmentation": segmentation}, where)

    def ellipse(self, name: Any, centre: Sequence[Any], radii: Sequence[Any], where: str, angle: float = 0) -> None:
        """An object with an ellipse, turned by degrees clockwise about its centre, as a polygon."""
        (x, y), (rx, ry) = numbers(centre, where, 2), numbers(radii, where, 2)
        steps = np.arange(ELLIPSE_POINTS) * (2 * math.pi / ELLIPSE_POINTS)
        points = np.stack([x + rx * np.cos(steps), y + ry * np.sin(steps)], axis=1)
        self.notes.add(f"ellipse, kept as a polygon of {ELLIPSE_POINTS} points", where)
        self.outline(name, [turned(points, angle, (x, y))], where)

    def mask(self, name: Any, mask: np.ndarray, where: str, left: int = 0, top: int = 0) -> None:
        """An object with a mask [h, w] bool whose first pixel is (left, top) of the image."""
        width, height = self.size
        whole = np.zeros((height, width), np.uint8)
        part = mask[max(0, -top) :, max(0, -left) :]
        room = whole[max(0, top) :, max(0, left) :]
        part = part[: room.shape[0], : room.shape[1]]
        room[: part.shape[0], : part.shape[1]] = part
        if not whole.any():
            return self.notes.add("mask without a pixel in its picture, left out", where)
        rle = rle_tools.encode(np.asfortranarray(whole))
        bbox, area = rle_tools.toBbox(rle).tolist(), float(rle_tools.area(rle))
        rle["counts"] = rle["counts"].decode()
        self._add(name, {"bbox": bbox, "area": area, "segmentation": rle}, where)

    def _add(self, name: Any, fields: dict[str, Any], where: str) -> None:
        own = {"id": len(self.annotations) + 1, "image_id": len(self.images), "iscrowd": 0}
        self.annotations.append(own | {"category_id": self.category(name, where)} | fields)

    def content(self) -> dict[str, Any]:
        """COCO instances, whose file names are those of pictures in the folder where these are found."""
        if not self.images:
            raise ValueError("there are no annotated images")
        if self.folder.is_dir():
            paths, variants, missing = find_files(self.folder, [image["file_name"] for image in self.images])
            for image, path in zip(self.images, paths):
                image["file_name"] = path or image["file_name"]
            for text in variants.values():
                self.notes.add("file name that is written in another way", text)
            for text in missing.values():
                self.notes.add(f"picture that is not in {self.folder}", text)
        categories = [{"id": id_, "name": name} for name, id_ in self.names.items()]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}


def numbers(values: Any, where: str, count: int = 4) -> list[float]:
    """Finite numbers. ValueError for anything else."""
    found = [number(value) for value in values] if isinstance(values, (list, tuple, np.ndarray)) else []
    if len(found) != count or None in found:
        raise ValueError(f"{where}: {values!r} must be {count} finite numbers")
    return found


def turned(points: Any, degrees: float, centre: Sequence[float]) -> np.ndarray:
    """Points [n, 2] turned clockwise, as they are seen, about a centre."""
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return (np.asarray(points, float) - centre) @ np.array([[cosine, sine], [-sine, cosine]]) + centre
