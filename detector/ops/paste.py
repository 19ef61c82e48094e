"""Masks between the box frame, the image and COCO's run-length code.

A mask of M x M probabilities covers its box. A pixel (i, j) belongs to the object if the probability at its centre
(j + 0.5, i + 0.5), bilinearly interpolated between the cell centres and zero outside the mask, reaches the threshold.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as rle_tools

PASTE_METHODS = ("aligned", "torchvision")


def paste_window(
    mask: np.ndarray, box: np.ndarray, height: int, width: int, threshold: float = 0.5, paste: str = "aligned"
) -> tuple[np.ndarray, int, int]:
    """The visible part of one instance's mask: (window [h, w] bool, top, left).

    mask: [M, M] probabilities; box: (x1, y1, x2, y2) in the image of height x width pixels, not necessarily inside it.
    paste: "aligned" samples exact box coordinates (Detectron2's geometry); "torchvision" rounds the box, padded by one
    mask cell, to whole pixels first, as torchvision does, and compares with > instead of >=.
    """
    if paste not in PASTE_METHODS:
        raise ValueError(f"paste is {paste!r}; choose one of {', '.join(PASTE_METHODS)}")
    if paste == "torchvision":
        box = _torchvision_box(box, mask.shape[0])
    cells = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), dtype=np.float32)
    cells[1:-1, 1:-1] = mask
    top, y, y_share = _neighbours(box[1], box[3], height, mask.shape[0])
    left, x, x_share = _neighbours(box[0], box[2], width, mask.shape[1])
    # gathers: as matrix products of this size they cost forty times as much where BLAS has several threads
    rows = cells[y] + y_share[:, None] * (cells[y + 1] - cells[y])
    lines = np.ascontiguousarray(rows.T)  # by columns, as COCO counts: what is gathered lies together
    values = (lines[1:] - lines[:-1])[x]
    values *= x_share[:, None]
    values += lines[x]
    return (values > threshold if paste == "torchvision" else values >= threshold).T, top, left


def _neighbours(start: float, end: float, size: int, cells: int) -> tuple[int, np.ndarray, np.ndarray]:
    """First pixel inside [start, end) and the image; for each pixel [pixels] the cell before its centre, counted in a
    mask with a zero cell at each end, and the share of the cell after it."""
    first, last = max(int(np.ceil(start - 0.5)), 0), min(int(np.ceil(end - 0.5)), size)
    if not end > start or last <= first:
        return 0, np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.float32)
    centres = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
    position = (centres - np.float32(start)) * np.float32(cells / (end - start)) + np.float32(0.5)
    before = np.minimum(position.astype(np.intp), cells)
    return first, before, position - before


def _torchvision_box(box: np.ndarray, cells: int) -> np.ndarray:
    """The box that torchvision pastes into: grown by a cell on each side and made whole pixels, then shrunk again."""
    centre, half = (box[:2] + box[2:]) * np.float32(0.5), (box[2:] - box[:2]) * np.float32(0.5)
    half = half * np.float32((cells + 2) / cells)
    first, last = np.trunc(centre - half), np.trunc(centre + half) + 1  # the last pixel is inside
    cell = (last - first) / (cells + 2)
    return np.concatenate([first + cell, last - cell])


def paste_masks(
    masks: ArrayLike, boxes: ArrayLike, height: int, width: int, threshold: float = 0.5, paste: str = "aligned"
) -> np.ndarray:
    """Full-size masks [D, height, width] bool of masks [D, M, M] in boxes [D, 4]."""
    masks, boxes = np.asarray(masks, np.float32), np.asarray(boxes, np.float32)
    image = np.zeros((len(boxes), height, width), dtype=bool)
    for out, mask, box in zip(image, masks, boxes):
        window, top, left = paste_window(mask, box, height, width, threshold, paste)
        out[top : top + window.shape[0], left : left + window.shape[1]] = window
    return image


def encode_window(window: np.ndarray, top: int, left: int, height: int, width: int) -> dict:
    """COCO's compressed RLE of an image that is zero but for `window` [h, w] bool at (top, left): only that is read.

    Returns {"size": [height, width], "counts": str}, the same bytes that pycocotools makes of the full image.
    """
    h, w = window.shape
    # COCO runs down the columns; a zero row between them ends every run inside its own column
    pixels = np.zeros(1 + w * (h + 1), dtype=bool)
    pixels[1:].reshape(w, h + 1)[:, :h] = window.T
    flips = np.flatnonzero(pixels[1:] != pixels[:-1])
    flips += flips // (h + 1) * (height - h - 1) + left * height + top
    if h == height:  # runs that go on at the top of the next column: their end and new start cancel
        joined = np.flatnonzero(flips[1:-1:2] == flips[2::2]) * 2 + 1
        flips = np.delete(flips, np.concatenate([joined, joined + 1]))
    ends = flips if len(flips) and flips[-1] == height * width else np.append(flips, height * width)
    counts = np.empty_like(ends)
    counts[:1], counts[1:] = ends[:1], ends[1:] - ends[:-1]
    rle = rle_tools.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
