"""Detections in network pixels to COCO results in pixels of the original image."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hotcoco import mask as rle_tools

from detector.data import CocoDataset, collate
from detector.evaluation import coco_metrics, detections_to_coco, to_original, write_json
from detector.structures import Batch, Detections
from tests.data.coco_files import minimal, write


def batch(sizes, originals, ids):
    height, width = (max(s[i] for s in sizes) for i in (0, 1))
    images = torch.zeros(len(ids), 3, height, width, dtype=torch.uint8)
    sizes, originals, ids = (torch.tensor(v) for v in (sizes, originals, ids))
    return Batch(images, sizes, originals, ids, torch.zeros_like(ids))


@pytest.fixture
def pair():
    """Two images, the first enlarged by 2, the second shrunk by 2 in y and by 4 in x; three rows each, one padding."""
    boxes = torch.tensor(
        [
            [[10, 20, 30, 60], [-5, 0, 200, 90], [0, 0, 9, 9]],
            [[2, 4, 6, 8], [50, 4, 60, 8], [0, 0, 9, 9]],
        ],
        dtype=torch.float32,
    )
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.7, 0.1]])
    labels = torch.tensor([[1, 2, 0], [2, 2, 0]])
    valid = torch.tensor([[True, True, False], [True, True, False]])
    masks = torch.ones(2, 3, 28, 28)
    return Detections(boxes, scores, labels, valid, masks), batch([(80, 100), (60, 50)], [(40, 50), (120, 200)], [7, 9])


def test_boxes_are_scaled_clipped_and_dropped_when_nothing_is_left(pair):
    results = detections_to_coco(*pair, category_ids=[11, 22])
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results] == [
        (7, 11, [5, 10, 10, 20]),
        (7, 22, [0, 0, 50, 40]),
        (9, 22, [8, 8, 16, 8]),
    ]  # the last box lies right of image 9
    assert [r["score"] for r in results] == pytest.approx([0.9, 0.5, 0.8])
    assert json.loads(json.dumps(results)) == results


def test_masks_fill_their_boxes_in_the_original_image(pair):
    for result in detections_to_coco(*pair, category_ids=[11, 22]):
        x, y, w, h = (int(v) for v in result["bbox"])
        expected = np.zeros((40, 50) if result["image_id"] == 7 else (120, 200), np.uint8)
        expected[y : y + h, x : x + w] = 1
        np.testing.assert_array_equal(rle_tools.decode(result["segmentation"]), expected)


def test_keypoints_are_scaled(pair):
    detections, images = pair
    points = torch.tensor([10.0, 20.0, 0.5]).expand(2, 3, 4, 3)
    results = detections_to_coco(detections._replace(keypoints=points), images, [11, 22])
    # COCO counts from the centre of the first pixel
    assert results[0]["keypoints"] == [4.5, 9.5, 0.5] * 4 and results[2]["keypoints"] == [39.5, 39.5, 0.5] * 4


def test_keypoints_that_are_read_come_back(tmp_path):
    """The objects of an annotation file as detections: the same numbers, and an OKS AP of 1."""
    coco, rng = minimal(), np.random.default_rng(0)
    for entry in coco["annotations"]:
        x, y, width, height = entry["bbox"]
        places = np.column_stack([x + rng.integers(0, width, 17), y + rng.integers(0, height, 17), np.full(17, 2)])
        entry |= {"category_id": 5, "keypoints": places.ravel().tolist(), "num_keypoints": 17}
    coco["categories"] = [{"id": 5, "name": "person", "keypoints": [str(i) for i in range(17)], "skeleton": []}]
    dataset = CocoDataset(tmp_path, write(tmp_path, coco), masks=False, keypoints=True)
    batch, targets = collate([dataset[i] for i in range(len(dataset))], 32)
    scores, extra = targets.valid.float(), {"keypoints": targets.keypoints}
    found = detections_to_coco(Detections(targets.boxes, scores, targets.labels, targets.valid, **extra), batch, [5])
    assert [r["keypoints"][:2] for r in found] == [a["keypoints"][:2] for a in coco["annotations"]]
    assert coco_metrics(coco, found, "keypoints")["AP"] == 1


def test_labels_without_a_category(pair):
    assert [r["category_id"] for r in detections_to_coco(*pair, category_ids=[None, 22])] == [22, 22]
    with pytest.raises(ValueError, match="label 2 of image 7 has no category: there are 1"):
        detections_to_coco(*pair, category_ids=[11])


def test_no_detections(pair):
    detections, images = pair
    empty = Detections(*(t[:, :0] if t is not None else None for t in detections))
    assert detections_to_coco(empty, images, [11, 22]) == []


def test_to_original_keeps_its_input(pair):
    before = [None if t is None else t.clone() for t in pair[0]]
    to_original(*pair)
    assert all(b is None or torch.equal(a, b) for a, b in zip(pair[0], before))


def test_json_is_whole_or_untouched(tmp_path):
    path = tmp_path / "deep" / "predictions.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [1, object()])
    assert json.loads(path.read_text()) == [1] and [p.name for p in path.parent.iterdir()] == [path.name]
