"""What predict.py does: image files in, pictures and a file of detections out."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from detector.checkpoint import write_json
from detector.config import ConfigError, RunError, config_errors, make_folder
from detector.data import read_image
from detector.evaluation.results import coco_keypoints
from detector.inference.draw import draw
from detector.inference.load import load
from detector.inference.predict import predict_batch
from detector.ops.paste import encode_window
from detector.runtime import start_ranks
from detector.settings import Runtime
from detector.structures import Detections

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")


def find_images(sources: str | Sequence[str]) -> list[Path]:
    """The image files that files, folders (with what is below them) and patterns name, each once, in order.

    Raises ConfigError for a source that names nothing.
    """
    found: dict[Path, None] = {}
    for source in [sources] if isinstance(sources, str) else sources:
        path = Path(source)
        if path.is_dir():
            paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.is_file():
            paths = [path]
        else:
            paths = sorted(Path(p) for p in glob(source, recursive=True) if Path(p).is_file())
        if not paths:
            raise ConfigError(f"images: {source!r} is no file, no folder with images, and matches nothing")
        found |= dict.fromkeys(paths)
    return list(found)


def predict_files(cfg: DictConfig) -> int:
    """Detect in the files that `cfg` (configs/predict.yaml) names; returns how many could not be read.

    Writes into cfg.output one picture for each image, under the image's own path below the folder that all share, and
    predictions.json in COCO's format: categories, images (file_name, height, width) and annotations with a score. An
    unreadable file is named and left out; what is done before an interruption is kept.
    """
    paths = find_images(cfg.images if isinstance(cfg.images, str) else list(cfg.images))
    with config_errors("device"):
        device = start_ranks(Runtime(device=cfg.device)).device
    model = load(cfg.checkpoint, device, trust=cfg.trust)
    shared = Path(os.path.commonpath([p.absolute().parent for p in paths]))
    output, images, annotations, failed = make_folder(cfg.output, "output"), [], [], []

    def finish(path: Path, image: np.ndarray, found: Detections) -> None:
        images.append(
            {"id": len(images) + 1, "file_name": str(path), "height": image.shape[0], "width": image.shape[1]}
        )
        for entry in to_annotations(found, images[-1]["id"], model.category_ids):
            annotations.append({"id": len(annotations) + 1, **entry})
        if cfg.draw:
            masks = None if found.masks is None else found.masks.numpy()
            numbers = found.boxes.numpy(), found.labels.numpy()
            picture = draw(image, *numbers, model.categories, found.scores.numpy(), masks)
            target = output / path.absolute().relative_to(shared)
            target = target.with_name(f"{target.name}.png")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(target)

    try:
        for start in tqdm(range(0, len(paths), cfg.batch_size), unit="batch", leave=False, disable=None):
            readable = []
            for path in paths[start : start + cfg.batch_size]:
                try:
                    readable.append((path, read_image(path)))
                except (ValueError, OSError) as error:
                    failed.append(path)
                    tqdm.write(f"left out: {error}", file=sys.stderr)
            arrays = [image for _, image in readable]
            found = predict_batch(model, arrays, cfg.threshold, cfg.paste, cfg.precision) if readable else []
            for (path, image), detections in zip(readable, found):
                finish(path, image, detections)
    finally:
        categories = [{"id": i, "name": name} for i, name in zip(model.category_ids, model.categories)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        write_json(output / "predictions.json", content)
    print(f"{len(annotations)} objects in {len(images)} images, {len(failed)} files unreadable; see {output}")
    if not images:
        raise RunError(f"none of the {len(failed)} files could be read")
    return len(failed)


def to_annotations(found: Detections, image_id: int, category_ids: Sequence[int]) -> list[dict]:
    """COCO annotations with a score, of the detections in one image as `predict` returns them."""
    entries = []
    for d, (x1, y1, x2, y2) in enumerate(found.boxes.tolist()):
        entry = {
            "image_id": image_id,
            "category_id": category_ids[found.labels[d] - 1],
            "score": float(found.scores[d]),
        }
        entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
        if found.masks is not None:
            mask = found.masks[d].numpy()
            entry |= {"segmentation": encode_window(mask, 0, 0, *mask.shape), "area": int(mask.sum())}
        if found.keypoints is not None:
            entry["keypoints"] = coco_keypoints(found.keypoints[d])
        entries.append(entry)
    return entries
