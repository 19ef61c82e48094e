"""Supervisely's format of projects: meta.json, and data sets whose ann/NAME.json belongs to img/NAME.

Rectangles, polygons (with holes) and bitmaps are read; other figures are counted and left out.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as rle_tools

from detector.data.formats.common import Notes
from detector.data.formats.shapes import Instances, numbers
from detector.data.read_coco import read_json


def read_supervisely(source: Path, images: Path | None = None, notes: Notes | None = None) -> dict:
    """COCO instances of a project; images: by default its folder, from which file names start.

    Raises FileNotFoundError where there is no meta.json or no annotation, ValueError for what cannot be read, by file,
    object and value.
    """
    notes = Notes() if notes is None else notes
    meta = source / "meta.json"
    if not meta.is_file():
        raise FileNotFoundError(f"{meta} does not exist: give the folder of a Supervisely project")
    found = Instances(images or source, notes)
    content = read_json(meta)
    for entry in content.get("classes") or [] if isinstance(content, dict) else []:
        found.category(entry.get("title"), str(meta))
    for file in sorted(source.rglob("ann/*.json")):
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
            raise ValueError(f"{file}: 'objects' must be a list: not an annotation of Supervisely")
        size = content.get("size") if isinstance(content.get("size"), dict) else {}
        name = (file.parent.parent / "img" / file.name.removesuffix(".json")).relative_to(source).as_posix()
        found.image(name, (size.get("width"), size.get("height")), str(file))
        for number, item in enumerate(content["objects"]):
            _read_object(found, item, f"{file}: object {item.get('id', number)}")
    if not found.images:
        raise FileNotFoundError(f"{source}: there is no ann/NAME.json in any of its data sets")
    return found.content()


def _read_object(found: Instances, item: dict[str, Any], where: str) -> None:
    kind, name = item.get("geometryType"), item.get("classTitle")
    if kind == "bitmap":
        return _bitmap(found, name, item.get("bitmap"), where)
    points = item.get("points")
    outer, holes = (points.get("exterior"), points.get("interior")) if isinstance(points, dict) else (None, None)
    if kind not in ("rectangle", "polygon"):
        return found.notes.add(f"{kind} left out, detection has no use for it", where)
    if not isinstance(outer, list):
        raise ValueError(f"{where}: points={points!r} have no exterior")
    if kind == "rectangle":
        corners = np.array([numbers(point, where, 2) for point in outer]).reshape(-1, 2)
        if len(corners) != 2:
            raise ValueError(f"{where}: a rectangle has 2 points, not {len(corners)}")
        return found.box(name, [*corners.min(0), *corners.max(0)], where)
    if not holes:
        return found.outline(name, [outer], where)
    width, height = found.size
    rings = [[v for point in ring for v in numbers(point, where, 2)] for ring in (outer, *holes)]
    masks = [rle_tools.decode(rle_tools.merge(rle_tools.frPyObjects([ring], height, width))) > 0 for ring in rings]
    return found.mask(name, masks[0] & ~np.any(masks[1:], axis=0), where)


def _bitmap(found: Instances, name: Any, bitmap: Any, where: str) -> None:
    """A PNG, packed by zlib, in base64: its alpha channel where there is one."""
    try:
        data = base64.b64decode(bitmap["data"], validate=True)
        left, top = map(int, numbers(bitmap["origin"], where, 2))
        with contextlib.suppress(zlib.error):  # some are not packed
            data = zlib.decompress(data)
        with Image.open(io.BytesIO(data)) as picture:
            mask = np.array(picture.getchannel("A") if "A" in picture.getbands() else picture.convert("L")) > 0
    except (KeyError, TypeError, binascii.Error, UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{where}: bitmap cannot be read ({error!r})") from None
    found.mask(name, mask, where, left, top)
