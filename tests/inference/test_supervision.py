"""To the package supervision and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import detector
from detector.inference.supervision import from_supervision, to_supervision
from detector.structures import Detections

sv = pytest.importorskip("supervision")


def test_there_and_back(checkpoint, shapes_tiny):
    model = detector.load(checkpoint)
    found = model.predict(min((shapes_tiny / "val").iterdir()), threshold=0)
    shown = to_supervision(found, model.categories)
    assert len(shown) == len(found.boxes) > 0 and shown.mask.shape == tuple(found.masks.shape)
    assert [model.categories[k] for k in shown.class_id] == shown.data["class_name"].tolist()
    assert len(shown[shown.confidence > shown.confidence.min()]) < len(shown)  # supervision's own ways work
    back = from_supervision(shown)
    for name in ("boxes", "scores", "labels", "valid", "masks"):
        torch.testing.assert_close(getattr(back, name), getattr(found, name).to(getattr(back, name).dtype))


def test_nothing_found_and_boxes_of_others():
    nothing = Detections(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.bool)
    )
    assert len(to_supervision(nothing, ["cat"])) == 0 and len(from_supervision(to_supervision(nothing)).boxes) == 0
    back = from_supervision(sv.Detections(xyxy=np.array([[1.0, 2, 3, 4]])))
    assert back.scores.tolist() == [1] and back.labels.tolist() == [1] and back.masks is None
