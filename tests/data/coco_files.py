"""Small COCO data sets made for a test."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from pathlib import Path

import cv2
import numpy as np

from detector.data.outlines import Outlines

MINIMAL = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 60, "height": 40},
        {"id": 9, "file_name": "b.png", "width": 40, "height": 60},
    ],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [5, 6, 20, 10], "iscrowd": 0, "area": 200,
         "segmentation": [[5, 6, 25, 6, 25, 16, 5, 16]]},
        {"id": 2, "image_id": 7, "category_id": 2, "bbox": [30, 20, 10, 10], "iscrowd": 0, "area": 100},
    ],
    "categories": [{"id": 5, "name": "cat"}, {"id": 2, "name": "dog"}],
}  # fmt: skip


def minimal() -> dict:
    return copy.deepcopy(MINIMAL)


def write(folder: Path, coco: object, name: str = "instances.json") -> Path:
    """The annotation file, and a random picture for every image that does not exist yet."""
    path = folder / name
    path.write_text(coco if isinstance(coco, str) else json.dumps(coco))
    for image in coco.get("images", []) if isinstance(coco, dict) else []:
        target = folder / image["file_name"]
        if not target.exists():
            pixels = np.random.default_rng(image["id"]).integers(0, 255, (image["height"], image["width"], 3), np.uint8)
            cv2.imwrite(str(target), pixels)
    return path


def pack(folder: Path, target: Path, count: int = 2, form: int = tarfile.PAX_FORMAT) -> str:
    """Its pictures in `count` shards in WebDataset's layout, with a .json beside each; the pattern of the shards."""
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for number in range(count):
        with tarfile.open(target / f"train-{number:06d}.tar", "w", format=form) as tar:
            for file in files[number::count]:
                tar.add(file, file.name)
                about = tarfile.TarInfo(f"{file.stem}.json")
                about.size = 2
                tar.addfile(about, io.BytesIO(b"{}"))
    return str(target / f"train-{{000000..{count - 1:06d}}}.tar")


def outlines_of(objects: list[list[np.ndarray]], even_odd: bool = False) -> Outlines:
    """Outlines from a list of rings per object."""
    rings = [np.asarray(ring, np.float64) for rings in objects for ring in rings]
    return Outlines(
        points=np.concatenate(rings) if rings else np.zeros((0, 2)),
        ring_starts=np.cumsum([0, *map(len, rings)]),
        ring_objects=np.repeat(np.arange(len(objects)), [len(rings) for rings in objects]).astype(int),
        even_odd=np.full(len(objects), even_odd),
    )


FIVE = ["left_top", "right_top", "right_bottom", "left_bottom", "centre"]


def five_points(root: Path, names: list[str] = FIVE, visibility: int = 2) -> Path:
    """`root` with a data set (data=custom) of bright rectangles, whose keypoints are the corners and the centre."""
    for split, count, seed in (("train", 8, 0), ("val", 4, 1)):
        rng = np.random.default_rng(seed)
        (root / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in range(1, count + 1):
            pixels = rng.integers(0, 80, (96, 96, 3), np.uint8)
            x, y, w, h = map(int, (*rng.integers(4, 40, 2), *rng.integers(24, 48, 2)))
            pixels[y : y + h, x : x + w] = (40, 200, 240)
            cv2.imwrite(str(root / split / f"{i}.png"), pixels)
            corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h), (x + w / 2, y + h / 2)]
            points = [value for corner in corners[: len(names)] for value in (*corner, visibility)]
            images.append({"id": i, "file_name": f"{i}.png", "width": 96, "height": 96})
            annotations.append(
                {"id": i, "image_id": i, "category_id": 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                | {"keypoints": points, "num_keypoints": len(names) * bool(visibility)}
            )
        coco = {"images": images, "annotations": annotations}
        coco["categories"] = [{"id": 1, "name": "card", "keypoints": names, "skeleton": []}]
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))
    return root
