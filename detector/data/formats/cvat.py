"""CVAT's own XML, "CVAT for images 1.1": annotations.xml, with the pictures in images/ if they were exported too.

Boxes, polygons, masks and ellipses are read. Polylines, points, skeletons, cuboids and tags are counted and left out.
"CVAT for video" has tracks over the frames of a film and no pictures: it is refused by name.

Own code: hotcoco's from_cvat takes rotated boxes as upright ones without a word, and drops masks and ellipses. CVAT's
COCO export needs no converter.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from detector.data.formats.common import Notes, only
from detector.data.formats.shapes import Instances, numbers
from detector.data.formats.voc import parse
from detector.data.read_coco import number, whole

LEFT_OUT = ("polyline", "points", "skeleton", "cuboid", "tag")


def read_cvat(source: Path, images: Path | None = None, notes: Notes | None = None) -> dict:
    """COCO instances of an XML file, or of the one in a folder; images: by default `images` beside it, or its folder.

    Raises FileNotFoundError where there is none, ValueError for tracks and for what cannot be read, by file, image,
    shape and value.
    """
    notes = Notes() if notes is None else notes
    file = source
    if source.is_dir():
        file = only(sorted(source.glob("*.xml")), f"the XML file in {source}")
    if file is None or not file.is_file():
        raise FileNotFoundError(f"{source}: no XML file; export the task from CVAT as 'CVAT for images 1.1'")
    tree = parse(file, "CVAT", "annotations")
    if (track := tree.find("track")) is not None:
        raise ValueError(
            f"{file}: <track> {track.get('id')!r} is of a film: export the task as 'CVAT for images 1.1', which has "
            "each frame as a picture"
        )
    found = Instances(images or usual_images(file.parent), notes)
    for label in tree.iterfind("meta//labels/label"):  # in the task's order, those without objects too
        if (name := label.findtext("name")) and label.find("parent") is None:
            found.category(name, str(file))
    for picture in tree.iterfind("image"):
        name = picture.get("name")
        if not name:
            raise ValueError(f"{file}: image {picture.get('id')}: name={name!r} is none")
        found.image(name, (picture.get("width"), picture.get("height")), f"{file}: image {name!r}")
        for place, shape in enumerate(picture):
            where = f"{file}: image {name!r} {shape.tag} {place}"
            if shape.tag in LEFT_OUT:
                notes.add(f"{shape.tag} left out, detection has no use for it", where)
            elif shape.tag in SHAPES:
                SHAPES[shape.tag](found, shape, where)
            else:
                raise ValueError(f"{where}: <{shape.tag}> is no shape that is known here; remove it in CVAT")
    return found.content()


def usual_images(folder: Path) -> Path:
    """Where an export has its pictures."""
    return folder / "images" if (folder / "images").is_dir() else folder


def _angle(shape: ElementTree.Element, where: str) -> float:
    return numbers([shape.get("rotation", "0")], f"{where} rotation", 1)[0]


def _box(found: Instances, shape: ElementTree.Element, where: str) -> None:
    corners = [shape.get(key) for key in ("xtl", "ytl", "xbr", "ybr")]
    found.box(shape.get("label"), corners, where, _angle(shape, where))


def _polygon(found: Instances, shape: ElementTree.Element, where: str) -> None:
    points = [point.split(",") for point in (shape.get("points") or "").split(";") if point.strip()]
    found.outline(shape.get("label"), [points], where)


def _ellipse(found: Instances, shape: ElementTree.Element, where: str) -> None:
    centre, radii = ([shape.get(key) for key in keys] for keys in (("cx", "cy"), ("rx", "ry")))
    found.ellipse(shape.get("label"), centre, radii, where, _angle(shape, where))


def _mask(found: Instances, shape: ElementTree.Element, where: str) -> None:
    """Run lengths of rows within a window, the first of them empty."""
    left, top, width, height = (number(shape.get(key)) for key in ("left", "top", "width", "height"))
    runs = [whole(text) for text in (shape.get("rle") or "").split(",")]
    if None in (left, top, width, height) or None in runs or min(runs) < 0 or sum(runs) != width * height:
        raise ValueError(f"{where}: rle, left, top, width and height do not fit: {_short(shape.attrib)}")
    pixels = np.repeat(np.arange(len(runs)) % 2, runs).reshape(int(height), int(width)).astype(bool)
    found.mask(shape.get("label"), pixels, where, int(left), int(top))


def _short(values: Sequence | dict) -> str:
    text = repr(values)
    return text if len(text) <= 120 else text[:117] + "..."


SHAPES = {"box": _box, "polygon": _polygon, "ellipse": _ellipse, "mask": _mask}
