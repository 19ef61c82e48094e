"""LVIS v1 (Gupta et al. 2019): COCO's pictures with 1,203 categories, in nearly COCO's format.

Its images have no file_name; its annotations are complete only for the categories that an image lists, which the
federated AP of evaluation/lvis.py respects.
"""

from __future__ import annotations

import json
from pathlib import Path

from detector.data.formats.common import Notes


def read_lvis(root: Path, split: str, notes: Notes | None = None) -> dict:
    """lvis_v1_SPLIT.json below root (or root/annotations), with file names like train2017/000000000009.jpg.

    Raises FileNotFoundError where there is no such file, ValueError where it is not LVIS.
    """
    name = f"lvis_v1_{split}.json"
    path = next((p for p in (root / name, root / "annotations" / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{root / name}: no such file, nor {root / 'annotations' / name}")
    try:
        content = json.loads(path.read_bytes())  # with a byte-order mark or without
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): it may be cut short, download it again") from None
    lists = [content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations", "categories")]
    if not all(isinstance(part, list) for part in lists):
        raise ValueError(f"{path}: 'images', 'annotations' and 'categories' must be lists: not LVIS?")
    for image in content["images"]:
        if "neg_category_ids" not in image or "not_exhaustive_category_ids" not in image:
            raise ValueError(f"{path}: image {image.get('id')} lacks LVIS's lists of checked categories: not LVIS?")
        if "file_name" not in image:
            if not isinstance(image.get("coco_url"), str):
                raise ValueError(f"{path}: image {image.get('id')} has neither file_name nor coco_url")
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    return content
