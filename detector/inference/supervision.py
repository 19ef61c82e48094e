"""Detections of one image for the package `supervision` (MIT; pip install supervision), and back.

found = detector.load("runs/quickstart/best.pt")
shown = to_supervision(found.predict("photo.jpg"), found.categories)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from detector.structures import Detections

if TYPE_CHECKING:
    import supervision


def to_supervision(found: Detections, categories: Sequence[str] | None = None) -> supervision.Detections:
    """What `predict` gives, as supervision.Detections; class ids begin at 0 there.

    categories: names of label 1, 2, ..., which become `data["class_name"]`. Keypoints have no place in it. Raises
    ImportError where supervision is not installed.
    """
    import supervision

    labels = found.labels.cpu().numpy()
    masks = None if found.masks is None else found.masks.cpu().numpy().astype(bool)
    names = {} if categories is None else {"class_name": np.array([categories[k - 1] for k in labels], dtype=str)}
    return supervision.Detections(
        xyxy=found.boxes.cpu().numpy().astype(np.float32).reshape(-1, 4),
        confidence=found.scores.cpu().numpy().astype(np.float32),
        class_id=labels - 1,
        mask=masks if masks is None or len(masks) else None,
        data=names,
    )


def from_supervision(found: supervision.Detections) -> Detections:
    """supervision.Detections as what `predict` gives: labels from 1, scores of 1 and the first label where it has
    none."""
    count = len(found.xyxy)
    scores = np.ones(count, np.float32) if found.confidence is None else found.confidence
    labels = np.ones(count, int) if found.class_id is None else np.asarray(found.class_id) + 1
    return Detections(
        boxes=torch.as_tensor(np.asarray(found.xyxy, np.float32)).reshape(-1, 4),
        scores=torch.as_tensor(np.asarray(scores, np.float32)),
        labels=torch.as_tensor(np.asarray(labels, np.int64)),
        valid=torch.ones(count, dtype=torch.bool),
        masks=None if found.mask is None else torch.as_tensor(np.asarray(found.mask, bool)),
    )
