"""What detectron2 and mmdetection computed on a real image with stand-in weights: features, proposals, detections.

Everything must be there, boxes within 0.01 px and scores within 1e-3. The weights are random, so many scores tie
(mmdetection's RPN has dozens that are 1 in float32), and torch's unstable sort decides: with another release of torch
such a box may lose to its rival.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle_tools

from detector.ops.paste import paste_masks
from detector.structures import Batch
from tests.weights import reference_detectron2, reference_mmdetection
from tests.weights.reference_parts import Found, Outputs, paste
from tests.weights.test_layouts import read_layout, stand_in_model, stand_in_weights

TIES = (0, 0) if torch.__version__.startswith("2.15.") else (9, 4)  # of 60 proposals, of 60 detections


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["detectron2-mask_rcnn_R_50_FPN_1x", "detectron2-faster_rcnn_R_50_C4_1x", "mmdet-mask-rcnn_r50_fpn_1x_coco"],
)
def test_same_outputs(shared, name):
    expected, image = recorded(shared, name)
    model = stand_in_model(shared, name)
    batch = read_batch(image)
    with torch.no_grad():
        features = model.features(batch)
        proposals, _ = model.rpn(features, batch)
        found = model.detect(features, batch)
    proposals = Found(proposals.boxes[0, proposals.valid[0]], proposals.scores[0, proposals.valid[0]])
    found = Found(
        *(field[0, found.valid[0]] for field in found[:3]),
        None if found.masks is None else found.masks[0, found.valid[0]],
    )
    check(Outputs(features, [proposals], [found._replace(labels=found.labels - 1)]), expected, paste_masks)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["detectron2-mask_rcnn_R_50_FPN_1x", "mmdet-mask-rcnn_r50_fpn_1x_coco"])
def test_the_reference_passes_themselves(shared, name):
    """What test_reference compares all layouts with."""
    expected, image = recorded(shared, name)
    reference = reference_detectron2 if name.startswith("detectron2") else reference_mmdetection
    pixels = torch.from_numpy(cv2.imread(str(image))).permute(2, 0, 1)
    outputs = reference.run(read_layout(shared, name), stand_in_weights(shared, name), [pixels])
    check(outputs, expected, lambda masks, boxes, *size: paste(masks, boxes, size).numpy())


def recorded(shared, name) -> tuple[dict, Path]:
    """What the framework computed, and the image."""
    file = shared / "parity" / "outputs" / f"{name}.json"
    if not file.exists():
        pytest.skip(f"no recorded outputs: {file} is missing")
    expected = json.loads(file.read_text())
    return expected, shared / "data" / "coco_cc_sample" / "images" / expected["image"]


def check(outputs: Outputs, expected: dict, paste_masks) -> None:
    maps = expected["features"]
    for level, wanted in zip(outputs.features, maps.values() if isinstance(maps, dict) else maps, strict=True):
        assert list(level.shape) == wanted["shape"]
        assert level.mean().item() == pytest.approx(wanted["mean"], abs=1e-4)
        assert level.std().item() == pytest.approx(wanted["std"], abs=1e-4)

    proposals, wanted = outputs.proposals[0], expected["proposals"]
    scores = wanted["scores"] if "scores" in wanted else torch.tensor(wanted["logits"]).sigmoid().tolist()
    lost_proposals, _ = lost(proposals.boxes, proposals.scores, None, wanted["boxes"], scores, None)
    found, wanted = outputs.detections[0], expected["detections"]
    lost_detections, pairs = lost(*found[:3], wanted["boxes"], wanted["scores"], wanted["labels"])
    assert len(proposals.boxes) == expected["proposals"]["count"]
    assert len(found.boxes) == expected["detections"]["count"]
    assert len(lost_proposals) <= TIES[0] and len(lost_detections) <= TIES[1]
    if found.masks is not None:
        rows = [mine for _, mine in pairs]
        masks = paste_masks(found.masks[rows], found.boxes[rows], *expected["image_size"])
        theirs = np.stack([rle_tools.decode(wanted["masks"][row]) for row, _ in pairs]).astype(bool)
        differing = (masks != theirs).sum(axis=(1, 2))  # all pixels agree but for a few on the threshold
        assert differing.sum() / theirs.size < 1e-5
        assert differing.max() <= 20


def read_batch(path) -> Batch:
    """An image at its own size, padded to a multiple of 32."""
    image = torch.from_numpy(cv2.imread(str(path))[:, :, ::-1].copy()).permute(2, 0, 1)
    height, width = image.shape[1:]
    padded = torch.nn.functional.pad(image, (0, -width % 32, 0, -height % 32))
    sizes = torch.tensor([[height, width]])
    return Batch(padded[None], sizes, sizes, torch.arange(1), torch.arange(1))


def lost(boxes, scores, labels, wanted_boxes, wanted_scores, wanted_labels) -> tuple[list[int], list[tuple[int, int]]]:
    """Rows of the wanted boxes that none of ours is, and the pairs (wanted row, our row) of the others."""
    lost_rows, pairs = [], []
    for row, (box, score) in enumerate(zip(wanted_boxes, wanted_scores)):
        far = (boxes - torch.tensor(box)).abs().amax(dim=1)
        if labels is not None:
            far = torch.where(labels == wanted_labels[row], far, torch.inf)
        best = int(far.argmin())
        if far[best] < 0.01 and abs(scores[best] - score) < 1e-3:
            pairs.append((row, best))
        else:
            lost_rows.append(row)
    return lost_rows, pairs
