"""Average recall of class-agnostic proposals (Hosang et al. 2015): what a model without a box head is measured by."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

from detector.evaluation.coco import _pycocotools

OBJECT = 1  # the id of the only category


def without_classes(annotations: dict) -> dict:
    """COCO annotations in which everything is of one category, 'object'."""
    folded = [{**annotation, "category_id": OBJECT} for annotation in annotations["annotations"]]
    return {**annotations, "annotations": folded, "categories": [{"id": OBJECT, "name": "object"}]}


def proposal_recall(annotations: dict, results: list[dict], limits: Sequence[int] = (100, 300, 1000)) -> dict:
    """{"AR100": ..., ...}: recall of the best `limits` proposals of each image, mean over IoU 0.5 to 0.95.

    annotations: of one category, see `without_classes`. results: COCO results. -1 if there is nothing to find.
    """
    evaluator = _pycocotools(annotations, results, "bbox")
    settings = evaluator.params
    settings.maxDets = list(limits)
    settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
    recall = evaluator.eval["recall"][:, 0, 0]  # [IoU thresholds, limits]
    return {f"AR{limit}": float(recall[:, m].mean()) for m, limit in enumerate(limits)}
