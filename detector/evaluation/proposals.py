"""Average recall of class-agnostic proposals (Hosang et al. 2015): what a model without a box head is measured by."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

from detector.data.annotations import Truth
from detector.evaluation.coco import check_annotations, check_predictions, for_backend, run_pycocotools

OBJECT = 1  # the id of the only category


def without_classes(annotations: dict | Truth) -> Truth:
    """The truth in which everything is of one category, 'object'."""
    return check_annotations(annotations).without_classes("object", OBJECT)


def proposal_recall(annotations: Truth, results: list[dict], limits: Sequence[int] = (100, 300, 1000)) -> dict:
    """{"AR100": ..., ...}: recall of the best `limits` proposals of each image, mean over IoU 0.5 to 0.95.

    annotations: of one category, see `without_classes`. results: COCO results. -1 if there is nothing to find.
    """
    evaluator = run_pycocotools(*for_backend(annotations, check_predictions(results, annotations)), "bbox")
    settings = evaluator.params
    settings.maxDets = list(limits)
    settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
    recall = evaluator.eval["recall"][:, 0, 0]  # [IoU thresholds, limits]
    return {f"AR{limit}": float(recall[:, m].mean()) for m, limit in enumerate(limits)}
