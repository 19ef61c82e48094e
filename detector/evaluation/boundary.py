"""Boundary AP: COCO's AP in which masks must also agree near their outlines.

Cheng, Girshick, Dollár, Berg, Kirillov: "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation",
CVPR 2021. The boundary region G_d of a mask G is its pixels within a distance d of its outline, d = 2 % of the image's
diagonal, at least 1 px. Boundary IoU = |G_d and P_d| / |G_d or P_d|; the AP uses min(mask IoU, boundary IoU) in place
of the mask IoU. As in the authors' code the distance counts steps of a 3 x 3 erosion, and the image's edge is an
outline.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from hotcoco import mask as rle_tools
from pycocotools.cocoeval import COCOeval

from detector.ops.paste import encode_window

DILATION_RATIO = 0.02
LEAST_IOU = 0.5  # the lowest threshold of COCO's AP


def boundary_width(height: int, width: int, ratio: float = DILATION_RATIO) -> int:
    """The distance d in pixels for an image of this size."""
    return max(1, round(ratio * float(np.hypot(height, width))))


def boundary_rle(rle: dict, ratio: float = DILATION_RATIO) -> dict:
    """The boundary region of a mask, compressed RLE in, compressed RLE out."""
    height, width = rle["size"]
    x, y, w, h = (int(v) for v in rle_tools.toBbox(rle))
    window = rle_tools.decode(rle)[y : y + h, x : x + w]
    eroded = cv2.erode(
        cv2.copyMakeBorder(window, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0),
        np.ones((3, 3), np.uint8),
        iterations=boundary_width(height, width, ratio),
    )[1:-1, 1:-1]
    return encode_window((window > eroded) if window.size else window.astype(bool), y, x, height, width)


def with_boundaries(ious: np.ndarray, detections: Sequence[dict], truth: Sequence[dict], crowd: Sequence) -> np.ndarray:
    """min(mask IoU, boundary IoU) [D, G] from the mask IoUs of detections and objects, compressed RLE.

    Where no threshold is in reach, the mask IoU may stay: most detections need no boundary.
    """
    rows, columns = (np.flatnonzero((ious >= LEAST_IOU).any(axis)) for axis in (1, 0))
    if len(rows):
        found, real = [boundary_rle(detections[i]) for i in rows], [boundary_rle(truth[i]) for i in columns]
        part = rle_tools.iou(found, real, [crowd[i] for i in columns])
        ious[np.ix_(rows, columns)] = np.minimum(ious[np.ix_(rows, columns)], part)
    return ious


class BoundaryEval(COCOeval):
    """pycocotools' evaluation with min(mask IoU, boundary IoU); made and run like its parent, with iouType "segm"."""

    def computeIoU(self, imgId, catId):
        ious = super().computeIoU(imgId, catId)
        if len(ious) == 0:
            return ious
        truth, detections = self._gts[imgId, catId], self._dts[imgId, catId]
        order = np.argsort([-d["score"] for d in detections], kind="mergesort")[: self.params.maxDets[-1]]
        masks = [detections[i]["segmentation"] for i in order], [t["segmentation"] for t in truth]
        return with_boundaries(ious, *masks, [int(t["iscrowd"]) for t in truth])
