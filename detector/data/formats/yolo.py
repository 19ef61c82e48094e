"""YOLO: a text file for each image, one object per line, all lengths as parts of the image's sides.

    class cx cy w h                a box            class cx cy w h confidence      a prediction's box
    class x1 y1 x2 y2 x3 y3 ...    a polygon; four points are an oriented box's, too

Own code: hotcoco's converter refuses polygons, leaves out images without objects and drops the suffix of file names.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from detector.data.file_names import find_files
from detector.data.formats.common import Notes, only, pictures, read_text, upright_size

BEYOND = 1.01  # as far as rounding carries a part of a side


def read_yolo(root: Path, split: str, notes: Notes | None = None) -> dict:
    """COCO instances of a split that root/data.yaml names, or of images/SPLIT; category ids are class numbers + 1.

    A split is a folder, a text file that lists images, or a list of these; as data.yaml has them they may begin with
    `path`, with `../`, or be absolute. The labels of .../images/.../a.jpg are .../labels/.../a.txt; an image without
    that file has no objects. notes: counts what was read although it is not as the format says.

    Raises FileNotFoundError for a missing data.yaml or image folder, ValueError for a wrong line or class.
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
    try:
        content = yaml.load(read_text(about), yaml.BaseLoader)  # words only: yes, no and 007 are names like others
    except yaml.YAMLError as error:
        raise ValueError(f"{about} is not YAML: {error}") from None
    names = class_names(about, content.get("names") if isinstance(content, dict) else None)
    images, annotations = [], []
    unlabelled = []
    for path in split_images(root, about, content, split):
        width, height, _ = upright_size(path)
        file_name = path.relative_to(root)
        images.append({"id": len(images) + 1, "file_name": file_name.as_posix(), "height": height, "width": width})
        labels = label_file(root, file_name)
        if not labels.is_file():
            unlabelled.append(file_name)
            continue
        for number, line in enumerate(read_text(labels).splitlines(), 1):
            if fields := re.findall(r"[^\s,;\0]+", line):
                entry = {"id": len(annotations) + 1, "image_id": len(images), "iscrowd": 0}
                annotations.append(entry | read_object(fields, width, height, names, f"{labels}:{number}", notes))
    if unlabelled and len(unlabelled) == len(images):
        raise ValueError(
            f"{about}: {split}: none of the {len(images)} images has a label file; that of {unlabelled[0]} would be "
            f"{label_file(root, unlabelled[0])}"
        )
    for file_name in unlabelled:
        notes.add("image without a label file, taken as one without objects", file_name)
    categories = [{"id": i + 1, "name": name} for i, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def class_names(about: Path, given: Any) -> dict[int, str]:
    """Names by class number; a dict may leave numbers out. ValueError names two classes of the same name."""
    if isinstance(given, list):
        given = dict(enumerate(given))
    numbers = isinstance(given, dict) and all(re.fullmatch(r"\d+", str(key)) for key in given)
    if not numbers or not given or not all(isinstance(name, str) for name in given.values()):
        raise ValueError(f"{about}: 'names' must be a list, or a dict from 0, 1, ..., of class names; it is {given!r}")
    names = {int(key): name for key, name in sorted(given.items(), key=lambda item: int(item[0]))}
    first: dict[str, int] = {}
    for number, name in names.items():
        if first.setdefault(name, number) != number:
            raise ValueError(
                f"{about}: classes {first[name]} and {number} are both named {name!r}, and categories are told apart "
                "by their names: give one of them another"
            )
    return names


def split_images(root: Path, about: Path, content: dict, split: str) -> list[Path]:
    """The images of a split, each once."""
    given = content.get(split) or f"images/{split}"
    found: dict[Path, None] = {}
    for entry in given if isinstance(given, list) else [given]:
        place = resolve(root, str(content.get("path") or ""), str(entry))
        if place is None:
            raise FileNotFoundError(f"{about}: {split}: {entry!r} is no folder below {root}, and no list of images")
        if place.is_dir():
            found |= dict.fromkeys(pictures(place))
            continue
        names = [line.strip() for line in read_text(place).splitlines() if line.strip()]
        paths, _, problems = find_files(root, names)
        if problems:
            raise ValueError(
                f"{place}: {len(problems)} of its images are not below {root}: {next(iter(problems.values()))}"
            )
        found |= dict.fromkeys(root / path for path in paths)
    if not found:
        raise ValueError(f"{about}: {split}: {given!r} holds no images")
    return list(found)


def resolve(root: Path, base: str, entry: str) -> Path | None:
    """Where an entry of data.yaml is below the root: from the root, from `path`, or by its longest end that is there.

    ValueError names two places that it may be.
    """
    entry, base = entry.replace("\\", "/"), base.replace("\\", "/")
    starts = [root, root / base] if base and not Path(base).is_absolute() else [root, Path(base)] if base else [root]
    inside = [
        place
        for place in (Path(start, entry) for start in starts)
        if place.exists() and place.resolve().is_relative_to(root.resolve())
    ]
    if not inside:  # ../valid/images, and paths of the machine that wrote the file
        parts = [part for part in re.split("/", entry) if part not in ("", ".", "..") and not part.endswith(":")]
        ends = (root.joinpath(*parts[start:]) for start in range(len(parts)))
        inside = [next((place for place in ends if place.exists()), None)]
    found = {place.resolve() for place in inside if place is not None}
    place = only(sorted(found), f"{entry!r} of data.yaml")
    return None if place is None else root / place.relative_to(root.resolve())


def label_file(root: Path, file_name: Path) -> Path:
    """Where the labels of an image are: the last folder `images` on its path becomes `labels`."""
    parts = list(file_name.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    path = (root / Path(*parts)).with_suffix(".txt")
    if not path.is_file() and path.with_suffix(".TXT").is_file():
        return path.with_suffix(".TXT")
    return path


def read_object(
    fields: list[str], width: int, height: int, names: dict[int, str], where: str, notes: Notes
) -> dict[str, Any]:
    """category_id, bbox, area and, of polygons, segmentation of one line."""
    try:
        label, values = float(fields[0]), [float(field) for field in fields[1:]]
    except ValueError:
        raise ValueError(f"{where}: {' '.join(fields)!r} must be a class number and numbers") from None
    if label not in names:
        raise ValueError(
            f"{where}: class {fields[0]} is not among the {len(names)} names of data.yaml, {min(names)} to {max(names)}"
        )
    if len(values) == 5:
        notes.add("confidence behind a box, left away", where)
        values = values[:4]
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(f"{where}: {len(values)} numbers after the class; a box has 4, a polygon 6, 8, 10, ...")
    check_parts(values, where)
    category = {"category_id": int(label) + 1}
    if len(values) == 4:
        cx, cy, w, h = values
        box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        return {**category, "bbox": box, "area": box[2] * box[3]}
    if len(values) == 8:
        notes.add("four points, a polygon or an oriented box: kept as an outline, the box is the upright one", where)
    x, y = [v * width for v in values[::2]], [v * height for v in values[1::2]]
    area = abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2
    box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
    polygon = [v for point in zip(x, y) for v in point]
    return {**category, "bbox": box, "area": area, "segmentation": [polygon]}


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
