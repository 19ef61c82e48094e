"""Cityscapes instances (Cordts et al. 2016), from the pictures *_gtFine_instanceIds.png.

These rather than the polygons: in them it is settled what hides what, and they are what the benchmark measures with.
A pixel holds class * 1000 + number in an instance, and the bare class in a group whose members cannot be told apart,
which becomes `iscrowd: 1`.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle_tools
from tqdm import tqdm

from detector.data.formats.common import Notes

CATEGORIES = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}


def read_cityscapes(root: Path, split: str, notes: Notes | None = None) -> dict:
    """COCO instances of the folders gtFine/SPLIT and leftImg8bit/SPLIT below root; category ids are Cityscapes' own.

    Raises FileNotFoundError where there are no instanceIds pictures, ValueError for one that cannot be read, or whose
    photograph is missing or of another size.
    """
    paths = (root / "gtFine" / split).glob("*/*_gtFine_instanceIds.*")
    paths = sorted(p for p in paths if p.suffix.lower() == ".png" and not p.name.startswith("."))
    if not paths:
        pattern = root / "gtFine" / split / "*" / "*_gtFine_instanceIds.png"
        raise FileNotFoundError(
            f"{pattern}: no such files: root must hold gtFine and leftImg8bit as they were unpacked"
        )
    images, annotations = [], []
    for path in tqdm(paths, desc=split, unit="image", leave=False, disable=None):
        pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED) if path.stat().st_size else None
        if pixels is None or pixels.ndim != 2:
            raise ValueError(f"{path} is no picture with one channel: unpack it again")
        if pixels.dtype == np.uint8 and np.isin(list(CATEGORIES), pixels).any():
            raise ValueError(f"{path} has 8 bits a pixel, which hold no numbers of instances: unpack it again")
        name = path.stem.replace("_gtFine_instanceIds", "_leftImg8bit.png")
        photograph = root / "leftImg8bit" / split / path.parent.name / name
        if not photograph.is_file():
            raise ValueError(f"{photograph} is missing, the photograph of {path}: unpack leftImg8bit beside gtFine")
        with Image.open(photograph) as picture:
            width, height = picture.size
        if (height, width) != pixels.shape:
            sizes = f"{pixels.shape[1]} x {pixels.shape[0]}, {photograph} {width} x {height}"
            raise ValueError(f"{path} is {sizes}: unpack both again")
        image = {"id": len(images) + 1, "file_name": photograph.relative_to(root).as_posix()}
        images.append(image | {"height": height, "width": width})
        for value in np.unique(pixels).tolist():
            category = value // 1000 if value >= 1000 else value
            if category in CATEGORIES:
                entry = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": category}
                annotations.append(entry | {"iscrowd": int(value < 1000)} | _region(pixels == value))
    categories = [{"id": id_, "name": name} for id_, name in CATEGORIES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _region(mask: np.ndarray) -> dict:
    rle = rle_tools.encode(np.asfortranarray(mask, np.uint8))
    box, area = rle_tools.toBbox(rle).tolist(), int(rle_tools.area(rle))
    return {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}, "bbox": box, "area": area}
