"""COCO metrics, masks as COCO stores them, and the loop that evaluates a model on a data set."""

from detector.checkpoint import write_json
from detector.evaluation.coco import coco_metrics
from detector.evaluation.evaluator import evaluate
from detector.evaluation.results import detections_to_coco, to_original
from detector.evaluation.tables import class_table, summary_table

__all__ = [
    "class_table",
    "coco_metrics",
    "detections_to_coco",
    "evaluate",
    "summary_table",
    "to_original",
    "write_json",
]
