"""YOLO: a text file for each image, one object per line, all lengths as parts of the image's sides.

    class cx cy w h                a box            class cx cy w h confidence      a prediction's box
    class x1 y1 x2 y2 x3 y3 ...    a polygon; four points are an oriented box's, too
    class cx cy w h x1 y1 ...      a box and keypoints, where data.yaml has `kpt_shape`

Four points are written as an outline and its upright box whichever of the two they are: the points are the same.

Own code: hotcoco's converter refuses polygons, leaves out images without objects and drops the suffix of file names.
"""

from __future__ import annotations

import functools
import math
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from detector.data.file_names import find_files
from detector.data.formats.common import Notes, Stems, fit, only, pictures, read_text, upright_size

BEYOND = 1.01  # as far as rounding carries a part of a side
VALIDATION = ("val", "valid", "validation")  # keys of data.yaml
LISTS = ("classes", "labels", "names", "notes")  # text files that tools leave among the labels


class _Words(yaml.BaseLoader):
    """YAML of words only, so that yes, no and 007 are names like others; a key that is there twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise _Twice(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Twice(yaml.constructor.ConstructorError):
    pass


def read_yolo(root: Path, split: str, notes: Notes | None = None) -> dict:
    """COCO instances of a split that root/data.yaml names, or of images/SPLIT; category ids are class numbers + 1.

    A split is a folder, a text file that lists images, or a list of these; as data.yaml has them they may begin with
    `path`, with `../`, or be absolute. The labels of .../images/.../a.jpg are .../labels/.../a.txt, or lie beside it;
    an image without that file has no objects. notes: counts what was read although it is not as the format says.

    Raises FileNotFoundError for a missing data.yaml or image folder, ValueError for a wrong line or class, and where
    two readings are possible.
    """
    notes = Notes() if notes is None else notes
    about = root / "data.yaml"
    if not about.is_file():
        others = [path for pattern in ("*.yaml", "*.yml") for path in sorted(root.glob(pattern))]
        about = only(others, f"{about} does not exist; the file with the class names")
        if about is None:
            raise FileNotFoundError(
                f"{root / 'data.yaml'} does not exist: it must give the class names, as 'names: [...]'"
            )
    content = read_about(about)
    names, numbers = class_names(about, content), keypoint_numbers(about, content)
    paths, are_folders = split_images(root, about, content, split, notes)
    labels = Labels(root)
    images, annotations = [], []
    unlabelled = []
    for path in paths:
        width, height, _ = upright_size(path)
        file_name = path.relative_to(root)
        images.append({"id": len(images) + 1, "file_name": file_name.as_posix(), "height": height, "width": width})
        file = labels.find(file_name)
        if file is None:
            unlabelled.append(file_name)
            continue
        for number, line in enumerate(read_text(file).splitlines(), 1):
            if line.strip():
                where = f"{file}:{number}"
                entry = {"id": len(annotations) + 1, "image_id": len(images), "iscrowd": 0}
                annotations.append(entry | read_object(line, width, height, names, numbers, where, notes))
    if unlabelled and len(unlabelled) == len(images):
        raise ValueError(
            f"{about}: {split}: none of the {len(images)} images has a label file; that of {unlabelled[0]} would be "
            f"{labels.folder(unlabelled[0]) / unlabelled[0].stem}.txt"
        )
    for file_name in unlabelled:
        notes.add("image without a label file, taken as one without objects", file_name)
    for file in labels.unused() if are_folders else []:
        notes.add("label file without a picture", file)
    categories = [{"id": i + 1, "name": name} for i, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def read_about(about: Path) -> dict:
    """The content of data.yaml, all values as words."""
    try:
        content = yaml.load(read_text(about), _Words)
    except _Twice as error:
        raise ValueError(f"{about}:{error.problem_mark.line + 1}: {error.problem}: keep one of them") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{about} is not YAML: {error}") from None
    return content if isinstance(content, dict) else {}


def class_names(about: Path, content: dict) -> dict[int, str]:
    """Names by class number; a dict may leave numbers out. ValueError names two classes of the same name."""
    given = content.get("names")
    if isinstance(given, list):
        given = dict(enumerate(given))
    numbers = isinstance(given, dict) and all(re.fullmatch(r"\d+", str(key)) for key in given)
    if not numbers or not given or not all(isinstance(name, str) for name in given.values()):
        raise ValueError(f"{about}: 'names' must be a list, or a dict from 0, 1, ..., of class names; it is {given!r}")
    names = {int(key): unicodedata.normalize("NFC", name.strip()) for key, name in given.items()}
    names = dict(sorted(names.items()))
    first: dict[str, int] = {}
    for number, name in names.items():
        if not name:
            raise ValueError(f"{about}: class {number} has no name: give it one in 'names'")
        if first.setdefault(name, number) != number:
            raise ValueError(
                f"{about}: classes {first[name]} and {number} are both named {name!r}, and categories are told apart "
                "by their names: give one of them another"
            )
    count = content.get("nc", str(len(names)))
    if count not in (str(len(names)), str(max(names) + 1)):
        raise ValueError(f"{about}: nc is {_shown(count)}, but there are {len(names)} names: mend one of the two")
    return names


def _shown(word: Any) -> str:
    return word if isinstance(word, str) and word.isdecimal() else repr(word)


def keypoint_numbers(about: Path, content: dict) -> int:
    """How many numbers the keypoints of an object have; 0 for data without."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    if not isinstance(shape, list) or len(shape) != 2 or not all(isinstance(n, str) and n.isdecimal() for n in shape):
        raise ValueError(f"{about}: kpt_shape is {shape!r}: must be [keypoints, 2 or 3], or be taken out")
    return int(shape[0]) * int(shape[1])


def split_images(root: Path, about: Path, content: dict, split: str, notes: Notes) -> tuple[list[Path], bool]:
    """The images of a split, each once, and whether all were found in folders, not in lists."""
    words = VALIDATION if split in VALIDATION else (split,)
    keys = [key for key in words if content.get(key) not in (None, "", "null", "~")]
    if len({str(content[key]) for key in keys}) > 1:
        raise ValueError(f"{about}: both {keys[0]!r} and {keys[1]!r} are given: keep one of them")
    given = content[keys[0]] if keys else f"images/{split}"
    found: dict[Path, None] = {}
    are_folders = True
    for entry in given if isinstance(given, list) else [given]:
        place = resolve(root, about, str(content.get("path") or ""), str(entry))
        if place is None:
            raise FileNotFoundError(f"{about}: {split}: {entry!r} is no folder below {root}, and no list of images")
        are_folders &= place.is_dir()
        found |= dict.fromkeys(pictures(place) if place.is_dir() else listed(root, place, notes))
    if not found:
        raise ValueError(f"{about}: {split}: {given!r} holds no images")
    return list(found), are_folders


def resolve(root: Path, about: Path, base: str, entry: str) -> Path | None:
    """Where an entry of data.yaml is below the root, None if nowhere.

    That is from the root, or from `path`, as they stand; without leading `../`, which Roboflow writes; or, of paths of
    another machine, some end of it. Raises ValueError for two places, one of which may lie outside the root.
    """
    top = os.path.abspath(root)
    parts = _parts(entry)
    if _is_absolute(entry):
        literal = [entry] if os.path.isabs(entry) else []
        ends = [parts[start:] for start in range(len(parts))]
    else:
        literal = [
            os.path.join(top, *_dotted(start), *_dotted(entry)) for start in ("", base) if not _is_absolute(start)
        ]
        literal += [os.path.join(base, *_dotted(entry))] if os.path.isabs(base) else []
        ends = [_parts(base)[start:] + parts for start in range(len(_parts(base)) + 1)]
    found = [place for place in map(os.path.normpath, literal) if os.path.exists(place)]
    if not _is_absolute(entry) or not any(map(functools.partial(_is_below, top), found)):
        found += [place for place in (os.path.join(top, *end) for end in ends if end) if os.path.exists(place)]
    found = list(dict.fromkeys(found))
    if len(found) > 1:
        raise ValueError(
            f"{about}: {entry!r} of data.yaml may be {' or '.join(sorted(found))}: write it as a path from {root}, and "
            "take `path` out"
        )
    if found and not _is_below(top, found[0]):
        raise ValueError(
            f"{about}: {entry!r} is {found[0]}, which is not below {root}: convert the folder that holds both"
        )
    return root / os.path.relpath(found[0], top) if found else None


def _is_absolute(path: str) -> bool:
    return bool(re.match(r"[\\/]|[A-Za-z]:[\\/]", path))


def _dotted(path: str) -> list[str]:
    """The parts of a path, `..` with them."""
    return [part for part in re.split(r"[\\/]", path) if part not in ("", ".") and not part.endswith(":")]


def _parts(path: str) -> list[str]:
    """The parts of a path without what leads out of where it starts."""
    return [part for part in os.path.normpath("/".join(_dotted(path))).split(os.sep) if part not in (".", "..")]


def _is_below(top: str, path: str) -> bool:
    return path == top or path.startswith(os.path.join(top, ""))


def listed(root: Path, listing: Path, notes: Notes) -> list[Path]:
    """The images that a text file names, from the root, from its own folder, or as another machine had them."""
    top = os.path.abspath(root)
    names = {n: line.strip() for n, line in enumerate(read_text(listing).splitlines(), 1) if line.strip()}
    found: dict[int, Path] = {}
    for number, name in names.items():
        starts = () if _is_absolute(name) else (top, os.path.abspath(listing.parent))
        places = [os.path.normpath(os.path.join(start, *_dotted(name))) for start in starts]
        places = [Path(place) for place in places if _is_below(top, place) and os.path.isfile(place)]
        place = only(places, f"{listing}:{number}: {name!r}")
        if place is not None:
            found[number] = root / place.relative_to(top)
    others = {number: name for number, name in names.items() if number not in found}
    paths, variants, problems = find_files(root, list(others.values()))
    if problems:
        number = list(others)[next(iter(problems))]
        raise ValueError(
            f"{listing}:{number}: {len(problems)} of its images are not below {root}: {next(iter(problems.values()))}: "
            "mend the list"
        )
    found |= {number: root / path for number, path in zip(others, paths)}
    for variant in variants.values():
        notes.add(f"image that {listing} names in another way", variant)
    return [found[number] for number in names]


class Labels:
    """The label files below a root, by the images that they belong to."""

    def __init__(self, root: Path):
        self.root = root
        self.images: dict[Path, Path] = {}  # by label file
        self.stems: Callable[[Path], Stems] = functools.cache(lambda folder: Stems(folder, (".txt",)))
        self.folders: set[Path] = set()

    def folder(self, file_name: Path) -> Path:
        """Where labels of an image are looked for: the last folder `images` on its path becomes `labels`."""
        parts = list(file_name.parent.parts)
        if "images" in parts:
            parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
        return self.root / Path(*parts)

    def find(self, file_name: Path) -> Path | None:
        """The labels of an image. Raises ValueError where there may be two, or they are another image's too."""
        folder, beside = self.folder(file_name), self.root / file_name.parent
        candidates = [
            path for place in dict.fromkeys((folder, beside)) for path in self.stems(place).find(file_name.stem)
        ]
        self.folders |= {folder} - {beside}
        path = only(candidates, f"the labels of {file_name}")
        if path is not None and self.images.setdefault(path, file_name) != file_name:
            raise ValueError(f"{path} would be of both {self.images[path]} and {file_name}: keep one of them")
        return path

    def unused(self) -> list[Path]:
        """Label files in folders of their own that belong to no image."""
        files = [path for folder in sorted(self.folders) for path in self.stems(folder).files]
        return [path for path in files if path not in self.images and path.stem not in LISTS]


def read_object(
    line: str, width: int, height: int, names: dict[int, str], keypoints: int, where: str, notes: Notes
) -> dict[str, Any]:
    """category_id, bbox, area and, of polygons, segmentation of one line. keypoints: how many numbers they have."""
    fields = split_fields(line, where)
    try:
        label, values = float(fields[0]), [float(field) for field in fields[1:]]
    except ValueError:
        raise ValueError(f"{where}: {line.strip()!r} must be a class number and numbers") from None
    if label not in names:
        is_full = max(names) < len(names)
        known = f"0 to {max(names)}" if is_full else ", ".join(map(str, names))
        raise ValueError(f"{where}: class {fields[0]} is not among the {len(names)} names of data.yaml, {known}")
    category = {"category_id": int(label) + 1}
    if keypoints:
        if len(values) not in (4, 4 + keypoints):
            raise ValueError(
                f"{where}: {len(values)} numbers after the class; kpt_shape of data.yaml asks for 4 or {4 + keypoints}"
            )
        if len(values) > 4:
            notes.add("keypoints, not read", where)
        values = values[:4]
    if len(values) == 5:
        if not 0 <= values[4] <= 1:
            raise ValueError(
                f"{where}: {fields[5]} behind a box is no confidence; oriented boxes with an angle are not read: "
                "export their corners, as class x1 y1 x2 y2 x3 y3 x4 y4"
            )
        notes.add("confidence behind a box, left away", where)
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(f"{where}: {len(values)} numbers after the class; a box has 4, a polygon 6, 8, 10, ...")
    check_parts(values, where)
    if len(values) == 4:
        cx, cy, w, h = values
        box = ((cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height)
        bbox = fit(box, width, height, where, notes)
        return {**category, "bbox": bbox, "area": bbox[2] * bbox[3]}
    if len(values) == 8:
        notes.add("four points, a polygon or an oriented box: kept as an outline, the box is the upright one", where)
    x, y = [min(max(v * width, 0), width) for v in values[::2]], [min(max(v * height, 0), height) for v in values[1::2]]
    area = abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2
    bbox = fit((min(x), min(y), max(x), max(y)), width, height, where, notes)
    polygon = [v for point in zip(x, y) for v in point]
    return {**category, "bbox": bbox, "area": area, "segmentation": [polygon]}


def split_fields(line: str, where: str) -> list[str]:
    """What stands between blanks, commas or semicolons. ValueError where commas may be points as well."""
    line = line.strip().rstrip(",;")
    has_others = ";" in line or re.search(r"[^\s,]\s+[^\s,]", line)
    if has_others and "." not in line and re.search(r"\d,\d", line):
        raise ValueError(f"{where}: the commas of {line!r} may stand for points: write 0.5, not 0,5")
    return re.split(r"\s*[,;]\s*|\s+", line)


def check_parts(values: list[float], where: str) -> None:
    """ValueError unless all values are parts of the image's sides."""
    if wrong := [v for v in values if not math.isfinite(v)]:
        raise ValueError(f"{where}: {wrong[0]} is no number that a box can have: mend the line or remove it")
    if max(values) > BEYOND:
        raise ValueError(
            f"{where}: {max(values):g} is no part of a side, which is 0 to 1: divide lengths in pixels by the image's "
            "width (x, w) or height (y, h)"
        )
    if min(values) < 1 - BEYOND or (len(values) == 4 and min(values[2:]) < 0):
        raise ValueError(f"{where}: {min(values):g} is negative: mend the line or remove it")
