"""LVIS v1 (Gupta et al. 2019): COCO's pictures with 1,203 categories, in nearly COCO's format.

Its images have no file_name; its annotations are complete only for the categories that an image lists, which the
federated AP of evaluation/lvis.py respects.
"""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

from detector.data.formats.common import Notes, only

LISTS = ("neg_category_ids", "not_exhaustive_category_ids")


def read_lvis(root: Path, split: str, notes: Notes | None = None) -> dict:
    """lvis_v1_SPLIT.json below root (or root/annotations), with file names like train2017/000000000009.jpg.

    Raises FileNotFoundError where there is no such file, ValueError where it is not LVIS or there are two.
    """
    name = f"lvis_v1_{split}.json"
    path = only([p for p in (root / name, root / "annotations" / name) if p.is_file()], f"split {split!r}")
    if path is None:
        raise FileNotFoundError(f"{root / name}: no such file, nor {root / 'annotations' / name}")
    try:
        content = json.loads(path.read_bytes())  # with a byte-order mark or without
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): it may be cut short, download it again") from None
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(part, list) for part in lists):
        raise ValueError(f"{path}: 'images', 'annotations' and 'categories' must be lists: not LVIS?")
    for number, image in enumerate(content["images"]):
        if not isinstance(image, dict):
            raise ValueError(f"{path}: images[{number}] is {image!r}, an object is needed: not LVIS?")
        where = f"{path}: image {image.get('id')}"
        if not all(key in image for key in LISTS):
            raise ValueError(f"{where} lacks LVIS's lists of checked categories: not LVIS?")
        if wrong := next((key for key in LISTS if not isinstance(image[key], list)), None):
            raise ValueError(f"{where}: {wrong} is {image[wrong]!r}: must be a list of category ids")
        name = image.get("file_name")
        if not name and isinstance(image.get("coco_url"), str):
            name = "/".join(unquote(urlsplit(image["coco_url"]).path).split("/")[-2:])
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} has neither file_name nor coco_url: download the file again")
        image["file_name"] = name.replace("\\", "/")
    return content
