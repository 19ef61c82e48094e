"""Boxes that cannot be what COCO's [x, y, width, height] in pixels says, though every single number is possible."""

from __future__ import annotations

import numpy as np

FEWEST = 3  # objects from which a set tells
FRACTIONS = (
    "bbox are fractions of the image, not pixels: multiply x and width by the image's width, y and height by its height"
)
CORNERS = "bbox are corners [x1, y1, x2, y2], not [x, y, width, height]: write x2 - x1 and y2 - y1 as width and height"


def wrong_boxes(boxes: np.ndarray, sizes: np.ndarray) -> str | None:
    """What is wrong with all boxes together, in words that say how to mend it; None where they may be right.

    boxes: [M, 4] (x, y, width, height) as they stand in the file. sizes: [M, 2] (height, width) of their images.

    Fractions: every number of every box lies in 0..1, in images of many pixels. Corners: taken as such all boxes lie in
    their images and have a size, and taken as they should be at least one in ten reaches out of its image by more than
    a pixel; of boxes that are right hardly any does.
    """
    boxes, sizes = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(sizes, np.float64).reshape(-1, 2)
    known = np.isfinite(boxes).all(1)
    boxes, sizes = boxes[known], sizes[known]
    if len(boxes) < FEWEST:
        return None
    limits = sizes[:, ::-1]  # (width, height)
    if boxes.min() >= 0 and boxes.max() <= 1 + 1e-6 and (limits >= 16).all():
        return FRACTIONS
    inside = (boxes[:, :2] >= -1) & (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits + 1)
    out = (boxes[:, :2] + boxes[:, 2:] > limits + 1).any(1)
    return CORNERS if inside.all() and out.mean() >= 0.1 else None
