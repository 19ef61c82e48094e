"""Pascal VOC: one XML file for each image (Everingham et al. 2010), as the challenge's own tools and others write it.

VOC counts pixels from 1 and includes the last one: xmin..xmax becomes the continuous box from xmin - 1 to xmax. Objects
marked difficult become `iscrowd: 1`: neither objects nor background are learnt there, and COCO's and VOC's AP ignore
them. Objects get masks where SegmentationObject has a picture: its pixels number the objects.

Own code: hotcoco's reader drops what stands before an entity (`R&amp;D` becomes `D`), reads UTF-8 only and takes a size
of 0 x 0 as it is.
"""

from __future__ import annotations

import math
import re
from pathlib import Path, PureWindowsPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools

from detector.data.dataset import image_suffixes
from detector.data.file_names import find_files
from detector.data.formats.common import Notes, only, pictures, read_text, upright_size

CORNERS = ("xmin", "ymin", "xmax", "ymax")
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
UNSAID = ("", "unspecified", "none", "null")


def read_voc(root: Path, split: str, notes: Notes | None = None) -> dict:
    """COCO instances of a split of VOC data.

    Args:
        root: VOCdevkit, or one data set laid out like VOC2007.
        split: like "VOC2007/trainval" (or "trainval" where root is VOC2007 itself), named in ImageSets/Main; like
            "VOC2012/Segmentation/val", named in ImageSets/Segmentation; or a folder that holds XML files, itself or in
            Annotations, with the images beside them or in JPEGImages or images.
        notes: counts what was read although it is not as VOC has it.

    Raises:
        FileNotFoundError: neither the list nor the folder exists.
        ValueError: an XML file is wrong, or one that the list names is missing.
    """
    notes = Notes() if notes is None else notes
    folder, name, kind = (root / split).parent, (root / split).name, "Main"
    if folder.name == "Segmentation":
        folder, kind = folder.parent, folder.name
    listing, wanted = folder / "ImageSets" / kind / f"{name}.txt", None
    if listing.is_file():
        lines = (line.split() for line in read_text(listing).splitlines())
        wanted = {line[0] for line in lines if line}
    elif (root / split).is_dir():
        folder = root / split
    else:
        raise FileNotFoundError(f"split {split!r}: there is neither a list {listing} nor a folder {root / split}")
    files = xml_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: there are no XML files, neither in it nor in {folder / 'Annotations'}")
    if wanted is not None and (missing := sorted(wanted - {file.stem for file in files})):
        raise ValueError(
            f"{listing}: {len(missing)} images have no XML file in {folder / 'Annotations'}: {missing[:5]}"
        )
    trees = {file: parse(file) for file in files}  # of all splits, which so have the same categories
    names = sorted({text(item, "name", file) for file, tree in trees.items() for item in tree.iter("object")})
    chosen = [file for file in files if wanted is None or file.stem in wanted]
    images, annotations = [], []
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": i, "name": label} for i, label in enumerate(names, 1)]
    paths = match_pictures(root, image_folder(folder), {file: trees[file] for file in chosen}, notes)
    for file in chosen:
        width, height = size_of(file, trees[file], paths[file], notes)
        image = {"id": len(images) + 1, "file_name": paths[file].relative_to(root).as_posix()}
        images.append(image | {"height": height, "width": width})
        for number, item in enumerate(trees[file].iter("object"), 1):
            x1, y1, x2, y2 = corners(item, f"{file}: object {number}", notes)
            entry = {"id": len(annotations) + 1, "image_id": image["id"]}
            entry["category_id"] = names.index(text(item, "name", file)) + 1
            entry |= {"bbox": [x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1], "area": (x2 - x1 + 1) * (y2 - y1 + 1)}
            annotations.append(entry | {"iscrowd": int(is_difficult(item, f"{file}: object {number}", notes))})
    add_masks(content, folder / "SegmentationObject")
    return content


def xml_files(folder: Path) -> list[Path]:
    """The XML files of a data set, sorted."""
    inside = folder / "Annotations"
    return sorted(p for p in (inside if inside.is_dir() else folder).iterdir() if p.suffix.lower() == ".xml")


def image_folder(folder: Path) -> Path:
    """Where the pictures of a data set are."""
    return next((folder / name for name in ("JPEGImages", "images") if (folder / name).is_dir()), folder)


def parse(file: Path) -> ElementTree.Element:
    """The annotation of an XML file, whatever encoding it declares."""
    data = file.read_bytes()
    declared = re.match(rb"""\s*<\?xml[^>]*encoding\s*=\s*["']([\w.:-]+)["']""", data)
    try:
        if declared and declared[1].lower() not in (b"utf-8", b"utf8", b"utf-16"):  # the parser knows only a few others
            tree = ElementTree.fromstring(re.sub(r"^\s*<\?xml[^>]*\?>", "", data.decode(declared[1].decode())))
        else:
            tree = ElementTree.fromstring(data)
    except (ElementTree.ParseError, UnicodeDecodeError, LookupError) as error:
        raise ValueError(
            f"{file} is not XML ({error}): mend the file, or save it in the encoding it declares"
        ) from None
    if tree.tag != "annotation":
        raise ValueError(f"{file}: the outermost element is <{tree.tag}>, VOC's is <annotation>: of another format?")
    return tree


def text(item: ElementTree.Element, name: str, file: Path) -> str:
    """The content of a child that has to be there."""
    found = (item.findtext(name) or "").strip()
    if not found:
        raise ValueError(f"{file}: an <{item.tag}> has no <{name}>: give it one")
    return found


def match_pictures(root: Path, folder: Path, trees: dict[Path, ElementTree.Element], notes: Notes) -> dict[Path, Path]:
    """The picture of each XML file: the one that <filename> names, or the one that is named like the XML file.

    Raises ValueError where both are there and differ.
    """
    given = [PureWindowsPath((tree.findtext("filename") or "").strip()).name for tree in trees.values()]
    named = dict(zip(trees, find_files(folder, given)[0]))
    by_stem: dict[str, list[Path]] = {}
    for path in pictures(folder):
        by_stem.setdefault(path.relative_to(folder).with_suffix("").as_posix().casefold(), []).append(path)
    found = {}
    for file, name in zip(trees, given):
        is_picture = Path(name).suffix.lower() in image_suffixes()
        candidates = [] if named[file] is None else [folder / named[file]]
        if not candidates and name:  # no extension, or another one than the picture has
            candidates = by_stem.get((Path(name).stem if is_picture else name).casefold(), [])
        if not candidates or candidates[0].stem != file.stem:
            candidates = candidates + by_stem.get(file.stem.casefold(), [])
        path = only(candidates, f"{file}: the picture (<filename> is {name!r})")
        if path is None:
            notes.add("picture that is not there", f"{file} <filename>{name}</filename>")
            path = folder / (name if is_picture else f"{name or file.stem}.jpg")
        elif path.name != name:
            notes.add("<filename> unlike the picture's name", f"{file} {name!r}: {path.relative_to(root)}")
        found[file] = path
    return found


def size_of(file: Path, tree: ElementTree.Element, path: Path, notes: Notes) -> tuple[int, int]:
    """(width, height) of the picture; what the XML file says where there is no picture."""
    given = tuple(number(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    if not path.is_file():
        if not all(side and side > 0 for side in given):
            raise ValueError(f"{file}: there is no size (<size> has {given}) and no picture {path} to take it from")
        return tuple(map(round, given))
    width, height, turned = upright_size(path)
    if given == (width, height):
        return width, height
    if turned and given == (height, width):
        raise ValueError(
            f"{file}: <size> is that of the picture as stored, but its EXIF data turn it by a quarter, and whether the "
            f"boxes are turned too cannot be known: save {path.name} upright, without EXIF orientation"
        )
    notes.add("<size> missing or wrong, taken from the picture", f"{file} {given}, {path.name} is {width} x {height}")
    return width, height


def corners(item: ElementTree.Element, where: str, notes: Notes) -> list[float]:
    """xmin, ymin, xmax, ymax of an object, in this order."""
    box = item.find("bndbox")
    values = [number(None if box is None else box.findtext(name)) for name in CORNERS]
    if None in values:
        shown = {name: None if box is None else box.findtext(name) for name in CORNERS}
        raise ValueError(f"{where}: <bndbox> must have four numbers, it has {shown}: mend it, or remove the object")
    x1, y1, x2, y2 = values
    if x1 > x2 or y1 > y2:
        notes.add("corners that change places", f"{where} {values}")
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


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


def add_masks(content: dict, folder: Path) -> None:
    """Put RLE masks, and their areas, into the annotations of images that have a picture of objects in `folder`.

    Raises ValueError for a picture of another size than its image.
    """
    by_image: dict[int, list[dict]] = {}
    for entry in content["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry)
    for image in content["images"]:
        path = folder / f"{Path(image['file_name']).stem}.png"
        if not path.is_file():
            continue
        pixels = np.array(Image.open(path))  # indices of a palette; 255 lies between objects
        if pixels.shape != (image["height"], image["width"]):
            size = f"{image['height']} x {image['width']}"
            raise ValueError(f"{path}: expected one number for each of {size} pixels, got {list(pixels.shape)}")
        for number, entry in enumerate(by_image.get(image["id"], []), 1):
            rle = rle_tools.encode(np.asfortranarray(pixels == number, np.uint8))
            if area := int(rle_tools.area(rle)):
                entry |= {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}, "area": area}
