"""A trained detector from its checkpoint, and detections in any image with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from glob import glob
from pathlib import Path

import cv2
import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from torch import nn
from tqdm import tqdm

from detector.config import (
    ConfigError,
    RunError,
    build,
    check_model_config,
    check_transforms_config,
    config_errors,
    make_folder,
)
from detector.data import Pipeline, Sample, collate, read_image
from detector.engine import checkpoint as checkpoints
from detector.engine import distributed
from detector.engine.settings import Runtime
from detector.evaluation.evaluator import autocast
from detector.evaluation.masks import encode_window, paste_masks
from detector.evaluation.proposals import OBJECT
from detector.evaluation.results import coco_keypoints, to_original, write_json
from detector.structures import Batch, Detections, to_device
from detector.visualize import draw
from detector.weights.portable import load_safetensors


def load(
    checkpoint: str | Path | Mapping, device: str | torch.device = "cpu", changes: Mapping | None = None
) -> nn.Module:
    """The model of a checkpoint (path, or what engine.checkpoint.load returned) in evaluation mode.

    The averaged weights are taken if the run kept any. changes: nested dict of settings of the model that differ from
    the checkpoint's, such as {"box_head": {"score_threshold": 0.01}}.

    It has, beyond the model that was trained: `categories` (names of label 1, 2, ...), `category_ids` (their COCO ids
    in the training set; of a model without a box head only "object"), `preprocess` (the validation transforms),
    `config` (the run's), and `predict`, which is the function below for this model.

    Raises ConfigError (a ValueError) naming the file if it is missing, damaged, or its weights do not fit its config.
    """
    name = checkpoint if isinstance(checkpoint, (str, Path)) else "checkpoint"
    state = checkpoint if isinstance(checkpoint, Mapping) else read(checkpoint)
    config, categories = state["config"], list(state["categories"])
    node = merge(config["model"], {"backbone": {"weights": None}} if "weights" in config["model"]["backbone"] else {})
    node = merge(node, changes or {})
    check_model_config(node)
    model = build(node, "model", num_classes=len(categories))
    try:
        model.load_state_dict(state["ema"] or state["model"])
    except RuntimeError as error:
        raise ConfigError(f"{name}: the weights do not fit the model of the same file: {error}") from None
    model.to(device).eval()
    if model.box_head is None:  # proposals, of whatever class
        model.categories, model.category_ids = ["object"], [OBJECT]
    else:
        model.categories, model.category_ids = categories, list(state["category_ids"])
    model.config = config
    model.preprocess = validation_transforms(config)
    model.predict = partial(predict, model)
    return model


def read(path: str | Path) -> dict:
    """A checkpoint, or a safetensors file that `python -m detector.weights export` wrote."""
    return load_safetensors(path) if Path(path).suffix == ".safetensors" else checkpoints.load(path)


def validation_transforms(config: Mapping) -> Pipeline:
    """The pipeline that a run's config prescribes for evaluation, checked to do no more than resize."""
    steps = (config.get("augment") or {}).get("val") or []
    check_transforms_config(steps)
    with config_errors("augment.val"):
        pipeline = Pipeline([instantiate(step, _convert_="all") for step in steps])
    probe = np.array([[0, 0, 96, 64], [12, 8, 72, 40]], np.float32)
    result = pipeline(np.zeros((64, 96, 3), np.uint8), probe)
    height, width = result.image.shape[:2]
    expected = probe * np.tile(np.array([width / 96, height / 64], np.float32), 2)
    if result.boxes.shape != probe.shape or np.abs(result.boxes - expected).max() > 1e-2 * max(height, width) / 64:
        raise ConfigError("augment.val: must only resize the image: detections could not be put back into the original")
    return pipeline


def merge(base: Mapping, changes: Mapping) -> dict:
    """Nested dicts: `base` with the values of `changes` that are not None."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            merged[key] = merge(base[key], value)
        elif value is not None and not (isinstance(value, Mapping) and not any(v is not None for v in value.values())):
            merged[key] = value
    return merged


def predict(
    model: nn.Module,
    image: str | Path | np.ndarray,
    threshold: float = 0.0,
    paste: str = "aligned",
    precision: str = "fp32",
) -> Detections:
    """Detections of at least `threshold` in one image: a file, or an array [H, W, 3] uint8 RGB.

    Returns boxes [D, 4] in pixels of the image, scores [D], labels [D] (1..K), valid [D] (all True) and, of a model
    with a mask head, masks [D, H, W] bool; best first, on the CPU. model: as `load` returns it. precision: fp32, or
    bf16, fp16: autocast of the network's layers.
    """
    return predict_batch(model, [image], threshold, paste, precision)[0]


@torch.inference_mode()
def predict_batch(
    model: nn.Module,
    images: Sequence[str | Path | np.ndarray],
    threshold: float = 0.0,
    paste: str = "aligned",
    precision: str = "fp32",
) -> list[Detections]:
    """`predict` for several images in one pass of the network."""
    arrays = [read_image(image) if isinstance(image, (str, Path)) else _check(image) for image in images]
    batch = as_batch(model, arrays)
    device = batch.images.device
    with autocast(device, precision):
        found = model(batch)
    found = to_original(found, batch)
    results = []
    for n, array in enumerate(arrays):
        keep = found.valid[n] & (found.scores[n] >= threshold)
        one = Detections(*(None if t is None else t[n][keep].cpu() for t in found))
        if one.masks is not None:
            masks = paste_masks(one.masks.float().numpy(), one.boxes.numpy(), *array.shape[:2], paste=paste)
            one = one._replace(masks=torch.from_numpy(masks))
        results.append(one)
    return results


def as_batch(model: nn.Module, arrays: Sequence[np.ndarray], scale: float = 1.0) -> Batch:
    """Images [H, W, 3] uint8 as the model wants them, on its device; `scale` makes them smaller than it is used to."""
    samples = []
    for number, array in enumerate(arrays):
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), None, None, None
        image = model.preprocess(array).image
        if scale != 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        samples.append(Sample(image, array.shape[:2], number, 0, *none))
    multiple = (model.config.get("data") or {}).get("pad_multiple", 32)
    return to_device(collate(samples, multiple)[0], next(model.parameters()).device)


def _check(image: np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"image must be a path or a uint8 array [H, W, 3] in RGB order, got {kind}")
    if 0 in image.shape:
        raise ValueError(f"image is empty: {list(image.shape)}")
    return image


# ------------------------------------------------------------------------------------------------- what predict.py does

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
        device = distributed.start(Runtime(device=cfg.device)).device
    model = load(cfg.checkpoint, device)
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
