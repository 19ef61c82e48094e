"""Object outlines: exact outlines of pixel masks, clipping to the image, and drawing into small grids.

An outline is a set of closed rings of continuous (x, y) points; pixel (column i, row j) covers [i, i+1) x [j, j+1).
COCO polygons are rings that add up; the rings of a pixel mask follow the pixels' edges and fill by the even-odd rule, so
that a hole is just one more ring. Either way no mask is ever drawn at the size of the image.
"""

from __future__ import annotations

import cv2
import numpy as np


def trace_rings(mask: np.ndarray) -> list[np.ndarray]:
    """The outline of a binary mask [H, W] as rings [P, 2] float32 along the pixels' edges.

    Filled by the even-odd rule they give back the mask exactly, holes included. Outer rings run counter-clockwise on the
    screen (positive `ring_area`), holes clockwise.
    """
    # OpenCV joins pixel centres. Seen twice as large, a pixel's two halves tell its two edges apart.
    doubled = np.ascontiguousarray(mask, np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, _ = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return [((contour[:, 0] + 1) // 2).astype(np.float32) for contour in contours]


def ring_area(ring: np.ndarray) -> float:
    """Signed area of a ring [P, 2]: positive where it runs counter-clockwise on the screen (y down)."""
    x, y = np.asarray(ring, np.float64).T
    return float(np.dot(y, np.roll(x, -1)) - np.dot(x, np.roll(y, -1))) / 2
