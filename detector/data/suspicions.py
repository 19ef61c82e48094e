"""Boxes that cannot be what COCO's [x, y, width, height] in pixels says, though every single number is possible."""

from __future__ import annotations

import numpy as np

FEWEST = 3  # objects from which a set tells
FRACTIONS = (
    "bbox are fractions of the image, not pixels: multiply x and width by the image's width, y and height by its height"
)
CORNERS = "bbox are corners [x1, y1, x2, y2], not [x, y, width, height]: write x2 - x1 and y2 - y1 as width and height"


class Boxes:
    """All boxes of a file, which come some at a time, and what can be wrong with them together.

    Fractions: every number of every box lies in 0..1, in images of many pixels. Corners: taken as such all boxes lie in
    their images and have a size, and taken as they should be at least one in ten reaches out of its image by more than
    a pixel; of boxes that are right hardly any does.
    """

    def __init__(self):
        self.count = self.out = 0
        self.fractions = self.corners = True

    def add(self, boxes: np.ndarray, sizes: np.ndarray) -> None:
        """boxes: [M, 4] (x, y, width, height) as in the file. sizes: [M, 2] (height, width) of their images."""
        if not (self.fractions or self.corners):
            return
        boxes, limits = np.asarray(boxes, np.float64).reshape(-1, 4), np.asarray(sizes, np.float64).reshape(-1, 2)
        known = np.isfinite(boxes).all(1)
        boxes, limits = boxes[known], limits[known, ::-1]  # (width, height)
        self.count += len(boxes)
        self.fractions = self.fractions and bool(((boxes >= 0) & (boxes <= 1 + 1e-6)).all() and (limits >= 16).all())
        inside = (boxes[:, :2] >= -1) & (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= limits + 1)
        self.corners = self.corners and bool(inside.all())
        self.out += np.count_nonzero((boxes[:, :2] + boxes[:, 2:] > limits + 1).any(1))

    def wrong(self) -> str | None:
        """What is wrong, in words that say how to mend it; None where they may be right."""
        if self.count < FEWEST:
            return None
        if self.fractions:
            return FRACTIONS
        return CORNERS if self.corners and self.out >= 0.1 * self.count else None
