"""A model that only proposes is measured by recall, whatever the class."""

from __future__ import annotations

import pytest
import torch

from detector.evaluation import coco_metrics, evaluate
from detector.evaluation.proposals import proposal_recall, without_classes
from detector.structures import Detections
from tests.evaluation.test_coco import random_case
from tests.evaluation.test_evaluator import Dataset, Oracle


def test_recall_at_100_is_coco_s():
    truth, predictions = random_case(0)
    truth = without_classes(truth)
    predictions = [{**p, "category_id": 1} for p in predictions]
    found = proposal_recall(truth, predictions, limits=(10, 100, 1000))
    expected = coco_metrics(truth, predictions, backend="pycocotools")
    assert found["AR10"] == pytest.approx(expected["AR10"]) and found["AR100"] == pytest.approx(expected["AR100"])
    assert found["AR1000"] >= found["AR100"] > 0


class ProposalOracle(Oracle):
    """Every object's box, all of label 1, as a model without a box head gives its proposals."""

    box_head = None

    def forward(self, batch) -> Detections:
        found = super().forward(batch)
        return Detections(found.boxes, found.scores, found.valid.long(), found.valid)


def test_classes_do_not_matter():
    truth, _ = random_case(0)
    perfect = [{**a, "score": 0.5} for a in truth["annotations"] if not a.get("iscrowd")]
    dataset = Dataset(truth)
    model = ProposalOracle(truth, perfect, masks=False)
    with torch.no_grad():
        metrics, results = evaluate(model, dataset.loader(dataset.image_ids), dataset, "cpu", progress=False)
    # not 1: boxes that reach out of their image are clipped
    assert metrics["bbox"]["AR1000"] == metrics["bbox"]["AR300"] == pytest.approx(metrics["bbox"]["AR100"])
    assert metrics["bbox"]["AR1000"] > 0.9
    assert set(metrics["per_class"]["bbox"]) == {"object"}
    assert {r["category_id"] for r in results} == {1}
