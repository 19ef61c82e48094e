"""LVIS v1 (Gupta et al. 2019): COCO's pictures with 1,203 categories, in nearly COCO's format.

Its images have no file_name; its annotations are complete only for the categories that an image lists, which the
federated AP of evaluation/lvis.py respects.
"""

from __future__ import annotations

import json
from pathlib import Path


def read_lvis(root: Path, split: str) -> dict:
    """lvis_v1_SPLIT.json below root (or root/annotations), with file names like train2017/000000000009.jpg.

    Raises FileNotFoundError where there is no such file, ValueError where it is not LVIS.
    """
    name = f"lvis_v1_{split}.json"
    path = next((p for p in (root / name, root / "annotations" / name) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{root / name}: no such file, nor {root / 'annotations' / name}")
    content = json.loads(path.read_bytes())
    for image in content["images"]:
        if "neg_category_ids" not in image or "not_exhaustive_category_ids" not in image:
            raise ValueError(f"{path}: image {image.get('id')} lacks LVIS's lists of checked categories: not LVIS?")
        if "file_name" not in image:
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    return content
