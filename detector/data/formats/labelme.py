"""LabelMe: a JSON file for each picture, beside it or elsewhere in the folder.

Polygons, rectangles, turned ones, circles and masks are read; points and lines are counted and left out. Shapes of one
label and one group_id are parts of one object.
"""

from __future__ import annotations

import base64
import io
import math
import os
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from detector.data.formats.common import Notes, is_hidden
from detector.data.formats.shapes import Instances, numbers
from detector.data.read_coco import read_json

OUTLINES = ("polygon", "oriented_rectangle")


def read_labelme(source: Path, images: Path | None = None, notes: Notes | None = None) -> dict:
    """COCO instances of all JSON files below a folder; images: by default that folder, from which file names start.

    Raises FileNotFoundError where there are none, ValueError for what cannot be read, by file, shape and value.
    """
    notes = Notes() if notes is None else notes
    files = sorted(p for p in source.rglob("*.json") if not is_hidden(p.relative_to(source))) if source.is_dir() else []
    found = Instances(images or source, notes)
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
            notes.add("JSON file without LabelMe's shapes, left out", file)
            continue
        name = content.get("imagePath")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{file}: imagePath={name!r} names no picture")
        path = os.path.normpath(file.relative_to(source).parent / PureWindowsPath(name).as_posix())
        found.image(Path(path).as_posix(), (content.get("imageWidth"), content.get("imageHeight")), str(file))
        parts: dict[tuple, list] = {}
        for number, shape in enumerate(content["shapes"]):
            where = f"{file}: shape {number}"
            if not isinstance(shape, dict) or not isinstance(shape.get("points"), list):
                raise ValueError(f"{where} has no points")
            group = shape.get("group_id")
            if shape.get("shape_type") in OUTLINES and group is not None:
                parts.setdefault((shape.get("label"), group), []).append(shape["points"])
            else:
                _read_shape(found, shape, where)
        for (label, group), polygons in parts.items():
            found.outline(label, polygons, f"{file}: group {group} of {label!r}")
    if not found.images:
        raise FileNotFoundError(f"{source}: no JSON file of LabelMe in this folder")
    return found.content()


def _read_shape(found: Instances, shape: dict[str, Any], where: str) -> None:
    kind, name, points = shape.get("shape_type", "polygon"), shape.get("label"), shape["points"]
    if kind in OUTLINES:
        return found.outline(name, [points], where)
    if kind not in ("rectangle", "circle", "mask"):
        return found.notes.add(f"{kind} left out, detection has no use for it", where)
    corners = np.array([numbers(point, where, 2) for point in points]).reshape(-1, 2)
    if len(corners) != 2 and not (kind == "rectangle" and len(corners) == 4):
        raise ValueError(f"{where}: a {kind} has 2 points, not {len(corners)}")
    if kind == "circle":
        radius = math.dist(*corners)
        return found.ellipse(name, corners[0], (radius, radius), where)
    if kind == "rectangle":
        return found.box(name, [*corners.min(0), *corners.max(0)], where)
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as picture:
            mask = np.array(picture.convert("L")) > 0
    except (KeyError, TypeError, ValueError, UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{where}: mask is no picture in base64 ({error})") from None
    left, top = corners.min(0).astype(int).tolist()
    return found.mask(name, mask, where, left, top)
