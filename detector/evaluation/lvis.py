"""LVIS's federated average precision (Gupta et al. 2019, section 2), computed by hotcoco.

A category counts in an image only where the annotators looked for it: where it has objects, or is listed in the image's
`neg_category_ids`; where it is in `not_exhaustive_category_ids`, detections that fit no object are not errors. The best
300 detections of an image count. APr, APc, APf: of rare, common and frequent categories.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detector.data.annotations import Truth
from detector.evaluation.coco import check_annotations, check_predictions, for_backend
from detector.settings import LVIS_LIMIT


def lvis_metrics(
    annotations: str | Path | dict | Truth,
    predictions: str | Path | list[dict],
    iou_type: str = "bbox",
    per_class: bool = False,
) -> dict:
    """LVIS's numbers as fractions of 1, -1 where there is nothing to measure.

    annotations: LVIS v1; predictions: COCO results. iou_type: bbox or segm.

    Returns {"AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300", "ARs300", "ARm300", "ARl300"},
    with per_class also "per_class": {category name: {"AP", "AP50", "AP75"}}. Raises ValueError for annotations without
    LVIS's lists, and as coco_metrics.
    """
    from hotcoco import COCO, LVISeval, LVISResults

    checked = check_annotations(annotations, iou_type)
    if not checked.federated:
        raise ValueError("annotations: every image needs LVIS's 'neg_category_ids'; for COCO's AP use coco_metrics")
    truth, results = for_backend(checked, check_predictions(predictions, checked, iou_type), iou_type)
    ground_truth = COCO(truth)
    evaluator = LVISeval(ground_truth, LVISResults(ground_truth, results, LVIS_LIMIT), iou_type)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summary_lines()
    metrics = {name.replace("@", ""): float(value) for name, value in evaluator.get_results().items()}
    if per_class:
        precision = evaluator.eval["precision"][:, :, :, 0, 0]  # [thresholds, recalls, categories]
        rows = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
        metrics["per_class"] = {
            category["name"]: {name: _mean(precision[at, :, k]) for name, at in rows.items()}
            for k, category in enumerate(truth["categories"])
        }
    return metrics


def _mean(precision: np.ndarray) -> float:
    measured = precision[precision > -1]
    return float(measured.mean()) if measured.size else -1.0
