"""Pascal VOC: one XML file for each image (Everingham et al. 2010), as the challenge's own tools and others write it.

VOC counts pixels from 1 and includes the last one: xmin..xmax becomes the continuous box from xmin - 1 to xmax. Objects
marked difficult become `iscrowd: 1`: neither objects nor background are learnt there, and COCO's and VOC's AP ignore
them. Objects get masks where SegmentationObject has a picture: its pixels number the objects.

Own code: hotcoco's reader drops what stands before an entity (`R&amp;D` becomes `D`), reads UTF-8 only and takes a size
of 0 x 0 as it is.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools

from detector.data.file_names import find_files
from detector.data.formats.common import (
    Notes,
    Stems,
    beyond,
    decode,
    fit,
    only,
    read_text,
    upright_size,
)
from detector.data.picture_files import image_suffixes

CORNERS = ("xmin", "ymin", "xmax", "ymax")
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
UNSAID = ("", "unspecified", "none", "null")
WIDE = re.compile(r"utf-?(16|32)", re.IGNORECASE)


def read_voc(root: Path, split: str, notes: Notes | None = None) -> dict:
    """COCO instances of a split of VOC data.

    Args:
        root: VOCdevkit, or one data set laid out like VOC2007.
        split: like "VOC2007/trainval" (or "trainval" where root is VOC2007 itself), named in ImageSets/Main or
            ImageSets; like "VOC2012/Segmentation/val", named in ImageSets/Segmentation; or a folder that holds XML
            files, itself or in Annotations, with the images beside them or in JPEGImages or images.
        notes: counts what was read although it is not as VOC has it.

    Raises:
        FileNotFoundError: neither the list nor the folder exists.
        ValueError: an XML file is wrong, one that the list names is missing, or two readings are possible.
    """
    notes = Notes() if notes is None else notes
    folder, listing = find_split(root, split)
    inside = only(xml_folders(folder), f"the XML files of {folder}")
    if inside is None:
        raise FileNotFoundError(f"{folder}: there are no XML files, neither in it nor in {folder / 'Annotations'}")
    files = Stems(inside, (".xml",))
    chosen = files.files if listing is None else listed(listing, files)
    trees = {file: parse(file) for file in files.files}  # of all splits, which so have the same categories
    names = sorted({text(item, "name", file) for file, tree in trees.items() for item in tree.iter("object")})
    images, annotations = [], []
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": i, "name": label} for i, label in enumerate(names, 1)]
    paths = match_pictures(root, image_folders(folder), {file: trees[file] for file in chosen}, notes)
    order = Order()
    for file in chosen:
        width, height, is_sure = size_of(file, trees[file], paths[file], notes)
        image = {"id": len(images) + 1, "file_name": paths[file].relative_to(root).as_posix()}
        images.append(image | {"height": height, "width": width})
        for number, item in enumerate(trees[file].iter("object"), 1):
            where = f"{file}: object {number}"
            x1, y1, x2, y2 = order.sort(corners(item, where), width, height, where)
            box = [x1 - 1, y1 - 1, x2, y2]
            if not is_sure and beyond(box, width, height) > 1:
                raise ValueError(
                    f"{where}: the box {[x1, y1, x2, y2]} does not fit the picture, {width} x {height}, and <size> "
                    f"does not say which it was drawn on: bring that one back as {paths[file].name}, or mend the box"
                )
            if 0 <= min(x1, y1) < 1:
                notes.add("box that begins at 0, where VOC counts from 1: up to a pixel too large there", where)
            bbox = fit(box, width, height, where, notes)
            entry = {"id": len(annotations) + 1, "image_id": image["id"]}
            entry["category_id"] = names.index(text(item, "name", file)) + 1
            entry |= {"bbox": bbox, "area": bbox[2] * bbox[3]}
            annotations.append(entry | {"iscrowd": int(is_difficult(item, where, notes))})
            if item.find("polygon") is not None:
                notes.add("outline beside the box, not read", where)
    order.settle(notes)
    add_masks(
        content, folder / "SegmentationObject", notes, listing is not None and listing.parent.name == "Segmentation"
    )
    return content


def find_split(root: Path, split: str) -> tuple[Path, Path | None]:
    """The folder of a data set and the list of the split's images, None where the folder is the split."""
    place = root / split
    folder = place.parent.parent if place.parent.name == "Segmentation" else place.parent
    kind = "Segmentation" if place.parent.name == "Segmentation" else "Main"
    lists = [folder / "ImageSets" / kind / f"{place.name}.txt"]
    lists += [folder / "ImageSets" / f"{place.name}.txt"] if kind == "Main" else []
    candidates = [path for path in lists if path.is_file()] + ([place] if xml_folders(place) else [])
    found = only(candidates, f"split {split!r}")
    if found is None:
        known = ", ".join(splits_of(root)) or "none"
        raise FileNotFoundError(
            f"split {split!r}: there is neither a list {lists[0]} nor a folder {place} with XML files; name others as "
            f"--train and --val; there are: {known}"
        )
    return (place, None) if found == place else (folder, found)


def splits_of(root: Path) -> list[str]:
    """Some splits that there are, those with short names first."""
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())] if root.is_dir() else []
    found: list[str] = []
    for folder in folders:
        lists = sorted(folder.glob("ImageSets/Main/*.txt")) + sorted(folder.glob("ImageSets/*.txt"))
        if not lists and xml_folders(folder):
            found.append(folder.relative_to(root).as_posix())
        found += [(folder.relative_to(root) / path.stem).as_posix() for path in lists]
    return sorted(found, key=lambda name: (len(name), name))[:8]


def xml_folders(folder: Path) -> list[Path]:
    """The folders of a data set that hold its XML files: itself, or Annotations."""
    if not folder.is_dir():
        return []
    inside = sorted(path for path in folder.iterdir() if path.name.lower() == "annotations" and path.is_dir())
    return [path for path in (folder, *inside) if Stems(path, (".xml",)).files]


def listed(listing: Path, files: Stems) -> list[Path]:
    """The XML files, in their own order, whose names a list has: bare, as in a class's list, or as those of files."""
    wanted, missing = set(), []
    for number, line in enumerate(read_text(listing).splitlines(), 1):
        if line.strip():
            found = next((found for stem in _stems(line.strip()) if (found := files.find(stem))), [])
            wanted |= {only(found, f"{listing}:{number}: {line!r}")}
            missing += [] if found else [line.strip()]
    if missing:
        raise ValueError(
            f"{listing}: {len(missing)} images have no XML file in {files.folder}: {sorted(missing)[:5]}: add them, "
            "or take these lines out"
        )
    return [file for file in files.files if file in wanted]


def _stems(line: str) -> Iterator[str]:
    """What a line of a list may mean, the plainest first."""
    *name, sign = line.rsplit(None, 1)
    for text in (line, *name) if sign in ("-1", "0", "1") else (line,):
        leaf = PureWindowsPath(text).name  # of paths with either separator
        yield leaf
        stem, suffix = os.path.splitext(leaf)
        if suffix.lower() == ".xml" or suffix.lower() in image_suffixes():
            yield stem


def image_folders(folder: Path) -> list[Path]:
    """Where the pictures of a data set may be."""
    inside = sorted(p for p in folder.iterdir() if p.name.lower() in ("jpegimages", "images") and p.is_dir())
    return [path for path in (*inside, folder) if Stems(path, image_suffixes()).files] or [*inside, folder][:1]


def parse(file: Path, kind: str = "VOC", outermost: str = "annotation") -> ElementTree.Element:
    """The annotation of an XML file, whatever encoding it declares."""
    data = file.read_bytes()
    declared = re.match(rb"""\s*<\?xml[^>]*encoding\s*=\s*["']([\w.:-]+)["']""", data)
    encoding = declared[1].decode() if declared else "utf-8"
    if WIDE.match(encoding):  # of a text that was never written to a file: this declaration is not in 16 bits itself
        encoding = "utf-8"
    if data.startswith((b"<\0", b"\0<")):
        encoding = "utf-16-le" if data.startswith(b"<") else "utf-16-be"
    try:
        tree = ElementTree.fromstring(decode(data, encoding).removeprefix("\ufeff"))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"{file} is not XML ({error}): mend the file, or save it in the encoding it declares"
        ) from None
    if tree.tag != outermost:
        raise ValueError(
            f"{file}: the outermost element is <{tree.tag}>, {kind}'s is <{outermost}>: of another format?"
        )
    return tree


def text(item: ElementTree.Element, name: str, file: Path) -> str:
    """The content of a child that has to be there, once."""
    found = item.findall(name)
    if len(found) > 1:
        raise ValueError(f"{file}: an <{item.tag}> has {len(found)} <{name}>: keep one of them")
    content = unicodedata.normalize("NFC", (found[0].text or "").strip()) if found else ""
    if not content:
        raise ValueError(f"{file}: an <{item.tag}> has no <{name}>: give it one")
    return content


def match_pictures(
    root: Path, folders: list[Path], trees: dict[Path, ElementTree.Element], notes: Notes
) -> dict[Path, Path]:
    """The picture of each XML file: the one that <filename> names, or the one that is named like the XML file.

    Raises ValueError where both are there and differ, or two XML files mean one picture.
    """
    given = [PureWindowsPath((tree.findtext("filename") or "").strip()).name for tree in trees.values()]
    named = [find_files(folder, given)[0] for folder in folders]
    stems = [Stems(folder, image_suffixes()) for folder in folders]
    found: dict[Path, Path] = {}
    users: dict[Path, Path] = {}
    for index, (file, name) in enumerate(zip(trees, given)):
        is_picture = Path(name).suffix.lower() in image_suffixes()
        candidates = [folder / paths[index] for folder, paths in zip(folders, named) if paths[index] is not None]
        if not candidates and name:  # no extension, or another one than the picture has
            candidates = [path for one in stems for path in one.find(Path(name).stem if is_picture else name)]
        if not candidates or candidates[0].stem != file.stem:
            candidates = candidates + [path for one in stems for path in one.find(file.stem)]
        path = only(candidates, f"{file}: the picture (<filename> is {name!r})")
        if path is None:
            if not is_picture:
                raise ValueError(f"{file}: there is no picture named like it, nor like its <filename>, {name!r}")
            notes.add("picture that is not there", f"{file} <filename>{name}</filename>")
            path = folders[0] / name
        elif path.name != name:
            notes.add("<filename> unlike the picture's name", f"{file} {name!r}: {path.relative_to(root)}")
        if users.setdefault(path, file) != file:
            raise ValueError(f"{users[path]} and {file} both mean {path}: remove one, or mend its <filename>")
        found[file] = path
    return found


def size_of(file: Path, tree: ElementTree.Element, path: Path, notes: Notes) -> tuple[int, int, bool]:
    """(width, height) of the picture, or what the XML file says where there is no picture; whether the two agree."""
    given = tuple(number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    has_size = all(side and side > 0 for side in given)
    if not path.is_file():
        if not has_size:
            raise ValueError(f"{file}: there is no size (<size> has {given}) and no picture {path} to take it from")
        return *map(round, given), True
    width, height, turned = upright_size(path)
    if given == (width, height):
        return width, height, True
    if turned and given == (height, width):
        raise ValueError(
            f"{file}: <size> is that of the picture as stored, but its EXIF data turn it by a quarter, and whether the "
            f"boxes are turned too cannot be known: save {path.name} upright, without EXIF orientation"
        )
    is_near = has_size and abs(given[0] - width) <= 1 and abs(given[1] - height) <= 1
    if has_size and not is_near and abs(given[0] * height - given[1] * width) <= max(given[0], width):
        raise ValueError(
            f"{file}: <size> is {given[0]:g} x {given[1]:g}, but {path.name} has the same shape in {width} x {height}, "
            "and on which of the two the boxes were drawn cannot be known: bring back the picture of that size, or "
            "take <size> out if the boxes fit this one"
        )
    notes.add("<size> missing or wrong, taken from the picture", f"{file} {given}, {path.name} is {width} x {height}")
    return width, height, is_near


def corners(item: ElementTree.Element, where: str) -> list[float]:
    """xmin, ymin, xmax, ymax of an object, as they are written."""
    boxes = item.findall("bndbox")
    if len(boxes) > 1:
        raise ValueError(f"{where} has {len(boxes)} <bndbox>: make each an object of its own")
    others = [name for name in ("robndbox", "polygon") if item.find(name) is not None]
    if not boxes and others:
        raise ValueError(f"{where} has a <{others[0]}>, which is not read, and no <bndbox>: give it its upright box")
    shown = {name: boxes[0].findtext(name) if boxes else None for name in CORNERS}
    values = [number(value) for value in shown.values()]
    if None in values:
        raise ValueError(f"{where}: <bndbox> must have four numbers, it has {shown}: mend it, or remove the object")
    return values


class Order:
    """Corners put in order. The last two may be a width and a height instead: the set's other boxes have to tell."""

    def __init__(self):
        self.turned: list[str] = []
        self.may_be_sizes = True

    def sort(self, values: list[float], width: int, height: int, where: str) -> list[float]:
        x1, y1, x2, y2 = values
        self.may_be_sizes &= x1 + x2 <= width + 1 and y1 + y2 <= height + 1
        if x1 > x2 or y1 > y2:
            self.turned.append(f"{where} {values}")
        return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]

    def settle(self, notes: Notes) -> None:
        """Raises ValueError where no box of the set says that the third and fourth numbers are no sizes."""
        if self.turned and self.may_be_sizes:
            raise ValueError(
                f"{self.turned[0]}: <xmax> or <ymax> is the smaller one in {len(self.turned)} objects, and in all "
                "they may be a width and a height as well: write corners, the larger ones as <xmax> and <ymax>"
            )
        for where in self.turned:
            notes.add("corners that change places", where)


def number(value: str | None) -> float | None:
    """A finite number, or None."""
    try:
        found = float(value or "")
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def is_difficult(item: ElementTree.Element, where: str, notes: Notes) -> bool:
    value: Any = item.findtext("difficult")
    if value is None or (word := value.strip().lower()) in NO:
        return False
    if word in YES:
        return True
    if word not in UNSAID:
        raise ValueError(f"{where}: <difficult> is {value!r}: must be 0 or 1, or left away")
    notes.add("<difficult> that says nothing, taken as 0", f"{where} {value!r}")
    return False


def add_masks(content: dict, folder: Path, notes: Notes, wanted: bool = False) -> None:
    """Put RLE masks, and their areas, into the annotations of images that have a picture of objects in `folder`.

    wanted: count the images that have none. Raises ValueError for a picture that cannot be read or has another size
    than its image.
    """
    by_image: dict[int, list[dict]] = {}
    for entry in content["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry)
    stems = Stems(folder, (".png",))
    for image in content["images"]:
        path = only(stems.find(Path(image["file_name"]).stem), f"the objects of {image['file_name']}")
        if path is None:
            if wanted:
                notes.add(f"image without a picture of its objects in {folder}", image["file_name"])
            continue
        try:
            pixels = np.array(Image.open(path))  # indices of a palette; 255 lies between objects
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {path} cannot be read: {error}") from None
        if pixels.shape != (image["height"], image["width"]):
            size = f"{image['height']} x {image['width']}"
            raise ValueError(f"{path}: expected one number for each of {size} pixels, got {list(pixels.shape)}")
        for number, entry in enumerate(by_image.get(image["id"], []), 1):
            rle = rle_tools.encode(np.asfortranarray(pixels == number, np.uint8))
            if area := int(rle_tools.area(rle)):
                entry |= {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}, "area": area}
