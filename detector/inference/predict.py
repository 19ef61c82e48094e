"""Detections of a trained detector in any image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

from detector.data import Sample, collate, read_image
from detector.data.dataset import MAX_PIXELS
from detector.evaluation.results import to_original
from detector.ops.paste import paste_masks
from detector.runtime import autocast
from detector.structures import Batch, Detections, to_device


def predict(
    model: nn.Module,
    image: str | Path | np.ndarray,
    threshold: float = 0.0,
    paste: str = "aligned",
    precision: str = "fp32",
    max_pixels: int | None = None,
) -> Detections:
    """Detections of at least `threshold` in one image: a file, or an array [H, W, 3] uint8 RGB.

    Returns boxes [D, 4] in pixels of the image, scores [D], labels [D] (1..K), valid [D] (all True) and, of a model
    with a mask head, masks [D, H, W] bool; best first, on the CPU. model: as `load` returns it. precision: fp32, or
    bf16, fp16: autocast of the network's layers. max_pixels: files of more pixels are refused; None: as in training.
    """
    return predict_batch(model, [image], threshold, paste, precision, max_pixels)[0]


@torch.inference_mode()
def predict_batch(
    model: nn.Module,
    images: Sequence[str | Path | np.ndarray],
    threshold: float = 0.0,
    paste: str = "aligned",
    precision: str = "fp32",
    max_pixels: int | None = None,
) -> list[Detections]:
    """`predict` for several images in one pass of the network."""
    limit = largest(model.config) if max_pixels is None else max_pixels
    arrays = [read_image(image, limit) if isinstance(image, (str, Path)) else _check(image) for image in images]
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


def largest(config: Mapping) -> int:
    """How many pixels an image could have in the training of this config: data.max_pixels."""
    return (config.get("data") or {}).get("max_pixels", MAX_PIXELS)


def as_batch(model: nn.Module, arrays: Sequence[np.ndarray], scale: float = 1.0) -> Batch:
    """Images [H, W, 3] uint8 as the model wants them, on its device; `scale` makes them smaller than it is used to."""
    samples = []
    for number, array in enumerate(arrays):
        none = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool), None, None, None
        image = model.preprocess(array).image
        if scale != 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        samples.append(Sample(image, array.shape[:2], number, 0, *none))
    return to_device(collate(samples, model.pad_multiple)[0], next(model.parameters()).device)


def _check(image: np.ndarray) -> np.ndarray:
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"image must be a path or a uint8 array [H, W, 3] in RGB order, got {kind}")
    if 0 in image.shape:
        raise ValueError(f"image is empty: {list(image.shape)}")
    return image
