"""YOLO: a text file for each image, one object per line, all lengths as parts of the image's sides.

    class cx cy w h            a box            class x1 y1 x2 y2 x3 y3 ...     a polygon

Own code: hotcoco's converter refuses polygons, leaves out images without objects and drops the suffix of file names.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def read_yolo(root: Path, split: str) -> dict:
    """COCO instances of a split that root/data.yaml names, or of images/SPLIT; category ids count from 1.

    The labels of .../images/.../a.jpg are .../labels/.../a.txt; an image without that file has no objects.

    Raises FileNotFoundError for a missing data.yaml or image folder, ValueError for a wrong line or class.
    """
    about = root / "data.yaml"
    if not about.is_file():
        raise FileNotFoundError(f"{about} does not exist: it must give the class names, as 'names: [...]'")
    content = yaml.safe_load(about.read_text(encoding="utf-8"))
    names = content.get("names") if isinstance(content, dict) else None
    names = (
        [names[i] for i in range(len(names))]
        if isinstance(names, dict) and set(names) == {*range(len(names))}
        else names
    )
    if not isinstance(names, list) or not names:
        raise ValueError(f"{about}: 'names' must be a list, or a dict from 0, 1, ..., of class names; it is {names!r}")
    given = str(content.get(split) or f"images/{split}")
    folder = root / Path(*(part for part in Path(given).parts if part != ".."))  # some tools write ../train/images
    if not folder.is_dir():
        raise FileNotFoundError(f"{about}: {split}: {given!r} is no folder below {root}")
    images, annotations = [], []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        with Image.open(path) as picture:
            width, height = picture.size[::-1] if picture.getexif().get(0x0112) in TURNED else picture.size
        file_name = path.relative_to(root)
        images.append({"id": len(images) + 1, "file_name": file_name.as_posix(), "height": height, "width": width})
        for number, line in enumerate(_lines(root, file_name), 1):
            if line.split():
                where = f"{_labels(root, file_name)}:{number}"
                entry = {"id": len(annotations) + 1, "image_id": len(images), "iscrowd": 0}
                annotations.append(entry | _object(line.split(), width, height, len(names), where))
    categories = [{"id": i, "name": str(name)} for i, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _labels(root: Path, file_name: Path) -> Path:
    parts = list(file_name.parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return (root / Path(*parts)).with_suffix(".txt")


def _lines(root: Path, file_name: Path) -> list[str]:
    path = _labels(root, file_name)
    return path.read_text().splitlines() if path.is_file() else []


def _object(fields: list[str], width: int, height: int, classes: int, where: str) -> dict:
    try:
        label, values = int(fields[0]), [float(field) for field in fields[1:]]
    except ValueError:
        raise ValueError(f"{where}: {' '.join(fields)!r} must be a class number and numbers") from None
    if not 0 <= label < classes:
        raise ValueError(f"{where}: class {label} is not among the {classes} names of data.yaml, 0 to {classes - 1}")
    if len(values) == 4:
        cx, cy, w, h = values
        box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
        return {"category_id": label + 1, "bbox": box, "area": box[2] * box[3]}
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{where}: {len(values)} numbers after the class; a box has 4, a polygon 6, 8, 10, ...")
    x, y = [v * width for v in values[::2]], [v * height for v in values[1::2]]
    area = abs(sum(x[i - 1] * y[i] - x[i] * y[i - 1] for i in range(len(x)))) / 2
    box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
    polygon = [v for point in zip(x, y) for v in point]
    return {"category_id": label + 1, "bbox": box, "area": area, "segmentation": [polygon]}
