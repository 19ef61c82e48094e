"""Evaluate a model on a data set, alone or with other processes: the same for eval.py and the training loop."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import distributed, nn
from tqdm import tqdm

from detector.checkpoint import write_json
from detector.evaluation.coco import as_rle, check_annotation, coco_metrics, read_json
from detector.evaluation.lvis import is_federated, lvis_metrics
from detector.evaluation.proposals import OBJECT, proposal_recall, without_classes
from detector.evaluation.results import detections_to_coco
from detector.evaluation.voc import voc_metrics
from detector.runtime import autocast, eval_mode
from detector.structures import to_device

log = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    loader: Iterable,
    dataset,
    device: torch.device | str,
    *,
    precision: str = "fp32",
    evaluator: str = "hotcoco",
    iou_types: Sequence[str] | None = None,
    per_class: bool = True,
    paste: str = "aligned",
    folder: str | Path | None = None,
    progress: bool = True,
    sigmas: Sequence[float] | None = None,
) -> tuple[dict, list[dict]]:
    """COCO metrics of `model` on `dataset`, and its results.

    loader: yields (Batch, Targets), all images of the data set; in a distributed run each rank's loader gives its own
    part, and an image that several ranks see counts once. dataset: a CocoDataset; its annotation file is the truth.
    precision: fp32, or bf16/fp16 autocast. iou_types: what to measure; None: boxes, and masks or keypoints where model
    and data set have them. Besides those of coco_metrics there is "voc": VOC's AP of boxes. Boxes and masks of a data
    set with LVIS's lists of checked categories are measured by LVIS's federated AP.
    folder: predictions.json and metrics.json are written there, the former before anything is measured. sigmas: of
    keypoints, see coco_metrics. `fit.rehearse` tells beforehand whether all this can be measured.

    A model without a box head is measured by its proposals, whatever their class, with "AR300" and "AR1000" beside the
    usual numbers.

    Returns ({iou type: the numbers of coco_metrics}, with "per_class": {iou type: {name: numbers}} beside them) on
    every rank, and the COCO results on rank 0 (an empty list elsewhere). The model's training mode is as it was before.
    """
    device = torch.device(device)
    proposals_only = getattr(model, "box_head", model) is None
    category_ids = [OBJECT] if proposals_only else dataset.category_ids
    found, kinds = predict(model, loader, category_ids, device, precision, paste, progress)
    shards = _gather((found, kinds))
    outcome: list = [None]
    results: list[dict] = []
    if shards is not None:  # rank 0
        try:
            by_image = {image: entries for shard, _ in shards for image, entries in shard.items()}
            truth = ground_truth(dataset)
            if missing := [image["id"] for image in truth["images"] if image["id"] not in by_image]:
                total = len(truth["images"])
                raise ValueError(f"the loader left out {len(missing)} of {total} images, ids {missing[:5]} among them")
            results = [entry for image in truth["images"] for entry in by_image[image["id"]]]
            if folder is not None:
                write_json(Path(folder) / "predictions.json", results)
            if proposals_only:
                truth = without_classes(truth)
            if iou_types is None:
                iou_types = measurable(truth, set().union(*(kinds for _, kinds in shards)))
            outcome = [measure(truth, results, iou_types, evaluator, per_class, sigmas)]
            if proposals_only and "bbox" in outcome[0]:
                outcome[0]["bbox"] |= proposal_recall(truth, results)
            if folder is not None:
                write_json(Path(folder) / "metrics.json", outcome[0], indent=1)
        except Exception as error:  # the other ranks wait for the outcome: they must not wait for ever
            outcome = [error]
    if _world() > 1:
        distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0], results


def predict(
    model: nn.Module,
    loader: Iterable,
    category_ids: Sequence[int | None],
    device: torch.device,
    precision: str = "fp32",
    paste: str = "aligned",
    progress: bool = True,
) -> tuple[dict[int, list[dict]], set[str]]:
    """COCO results by image id for all images of `loader`, and the IoU types that the model predicts."""
    results: dict[int, list[dict]] = {}
    kinds = {"bbox"}
    quiet = None if progress and _rank() == 0 else True  # None: where nobody watches
    bar = tqdm(loader, desc="evaluate", unit="batch", disable=quiet, leave=False)
    with eval_mode(model), torch.inference_mode(), autocast(device, precision):
        for batch, _ in bar:
            detections = model(to_device(batch, device))
            kinds |= {k for k, v in (("segm", detections.masks), ("keypoints", detections.keypoints)) if v is not None}
            results |= {image: [] for image in batch.image_ids.tolist()}
            for entry in detections_to_coco(detections, batch, category_ids, paste=paste):
                results[entry["image_id"]].append(entry)
    return results, kinds


def ground_truth(dataset) -> dict:
    """COCO annotations of the images of a data set; with its on_error="skip" without entries that cannot be used."""
    truth = read_json(dataset.annotation_file, "annotation")
    ids = set(map(int, dataset.image_ids))
    images = {
        image["id"]: image for image in truth["images"][::-1] if isinstance(image, dict) and image.get("id") in ids
    }
    categories = {category["id"] for category in truth["categories"]}

    def usable(entry: dict) -> bool:
        if not isinstance(entry, dict) or entry.get("image_id") not in ids:
            return False  # an image that was left out, unless the id is wrong
        if dataset.on_error == "raise":
            return True
        try:
            check_annotation(entry, "", images, categories)
            return not entry.get("segmentation") or bool(as_rle(entry["segmentation"], images[entry["image_id"]], ""))
        except (ValueError, TypeError):
            return False

    annotations = [entry for entry in truth["annotations"] if usable(entry)]
    return {
        "images": [images[i] for i in sorted(images)],
        "annotations": annotations,
        "categories": truth["categories"],
    }


def measurable(annotations: dict, predicted: set[str]) -> list[str]:
    """Those of the predicted IoU types that every object of the data set has the truth for; the others are logged."""
    kinds = [kind for kind in ("bbox", "segm", "keypoints") if kind in predicted]
    for kind, field in (("segm", "segmentation"), ("keypoints", "keypoints")):
        lacking = sum(not annotation.get(field) for annotation in annotations["annotations"])
        if kind in kinds and lacking:
            log.warning("%s is not measured: %d objects of the data set have no %r", kind, lacking, field)
            kinds.remove(kind)
    return kinds


def measure(
    annotations: dict,
    results: list[dict],
    iou_types: Sequence[str],
    evaluator: str,
    per_class: bool,
    sigmas: Sequence[float] | None = None,
) -> dict:
    """The layout of metrics.json: {iou type: numbers} and, if asked for, {"per_class": {iou type: {name: numbers}}}."""

    def numbers(kind: str) -> dict:
        if kind == "voc":
            return voc_metrics(annotations, results, per_class)
        if kind in ("bbox", "segm") and is_federated(annotations):
            return lvis_metrics(annotations, results, kind, per_class)
        return coco_metrics(annotations, results, kind, evaluator, per_class, sigmas=sigmas)

    metrics = {kind: numbers(kind) for kind in iou_types}
    if per_class:
        metrics["per_class"] = {kind: metrics[kind].pop("per_class") for kind in iou_types}
    return metrics


# ----------------------------------------------------------------------------------------------------------- processes


def _world() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _rank() -> int:
    return distributed.get_rank() if _world() > 1 else 0


def _gather(value) -> list | None:
    """The values of all ranks on rank 0, None elsewhere."""
    if _world() == 1:
        return [value]
    values = [None] * _world() if _rank() == 0 else None
    distributed.gather_object(value, values)
    return values
