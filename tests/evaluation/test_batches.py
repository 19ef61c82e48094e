"""What is found in an image depends on that image alone: not on the batch it came in, nor on the order of the file."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

import detector
from detector.data import build_dataset, build_loader, read_image
from detector.evaluation import evaluate
from tests.tiny import OVERRIDES
from tests.untrained import configured, untrained

SMALL = [*OVERRIDES, "augment=none", "model.rpn.post_nms_top_n=[60,60]", "model.box_head.detections_per_image=20"]
SIDES = [(48, 90), (100, 40), (96, 96), (33, 64), (64, 65), (70, 120), (128, 32), (50, 50)]


@pytest.fixture(scope="module")
def mixed(shapes_tiny, tmp_path_factory):
    """The validation images of shapes_tiny, each in another size; and the same with its records turned round."""
    root = tmp_path_factory.mktemp("mixed")
    content = json.loads((shapes_tiny / "annotations/instances_val.json").read_text())
    for record, (height, width) in zip(content["images"], SIDES, strict=True):
        image = cv2.imread(str(shapes_tiny / "val" / record["file_name"]))
        cv2.imwrite(str(root / record["file_name"]), cv2.resize(image, (width, height)))
        scale = np.array([width / record["width"], height / record["height"]] * 2)
        record |= {"width": width, "height": height}
        for entry in content["annotations"]:
            if entry["image_id"] == record["id"]:
                entry["bbox"] = (np.array(entry["bbox"]) * scale).tolist()
                x, y, w, h = entry["bbox"]
                entry |= {"area": w * h, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "iscrowd": 0}
    (root / "val.json").write_text(json.dumps(content))
    content["images"].reverse()
    (root / "turned.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def model(mixed):
    """Its norms have statistics, so that they fill padding with what is not zero, as those of a trained one do."""
    model = detector.load(untrained(configured(*SMALL, f"data.root={mixed}")))
    torch.manual_seed(0)
    for name, values in model.model.named_buffers():
        if name.endswith("running_mean"):
            values.normal_()
    for name, parameter in model.model.named_parameters():
        if "class_logits.weight" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def measured(model, root, batch_size, annotations="val.json", **padding):
    data = model.config["data"] | {"root": str(root), "val": {"images": ".", "annotations": annotations}}
    dataset = build_dataset(data, "val", model.config["augment"], categories=model.categories)
    loader = build_loader(dataset, batch_size, 0, training=False, **padding)
    return evaluate(model.model, loader, dataset, "cpu", progress=False)


def test_the_batch_and_the_order_of_images_do_not_matter(model, mixed):
    metrics, results = measured(model, mixed, 1)
    assert len(results) > 50 and metrics["bbox"]["AR100"] > 0
    others = [{"batch_size": 3}, {"batch_size": 8}, {"batch_size": 3, "annotations": "turned.json"}]
    others += [{"batch_size": 3, "group_by_aspect": False}, {"batch_size": 2, "pad_to": (160, 192)}]
    for options in others:
        assert measured(model, mixed, **options) == (metrics, results), options


def test_prediction_finds_what_evaluation_finds(model, mixed):
    _, results = measured(model, mixed, 8)
    images = [read_image(path) for path in sorted(mixed.glob("*.jpg"))]
    alones = model.predict(images, threshold=0, batch_size=1)
    for number, (alone, together) in enumerate(zip(alones, model.predict_batch(images, threshold=0))):
        assert all(a is None or torch.equal(a, b) for a, b in zip(alone, together))
        scores = [entry["score"] for entry in results if entry["image_id"] == number + 1]
        assert scores == alone.scores.tolist()


def test_the_padding_of_a_run_is_that_of_its_model(mixed):
    """Alone or not, on whatever canvas: to multiples of data.pad_multiple."""
    wide, model = (
        detector.load(untrained(configured(*SMALL, f"data.root={mixed}", f"data.pad_multiple={multiple}")))
        for multiple in (64, 32)
    )
    assert (wide.model.pad_multiple, model.model.pad_multiple) == (64, 32)
    assert measured(wide, mixed, 1, pad_multiple=64) == measured(wide, mixed, 3, pad_multiple=64, pad_to=(192, 192))
    assert wide.model.canvases(torch.tensor([[33, 64], [65, 1]])).tolist() == [[64, 64], [128, 64]]
