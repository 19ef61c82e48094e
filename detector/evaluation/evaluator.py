"""Evaluate a model on a data set, alone or with other processes: the same for eval.py and the training loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import distributed, nn
from tqdm import tqdm

from detector.checkpoint import write_json
from detector.data.annotations import Truth
from detector.evaluation.attributes import attribute_metrics
from detector.evaluation.coco import Results, check_annotations, coco_metrics
from detector.evaluation.lvis import lvis_metrics
from detector.evaluation.proposals import OBJECT, proposal_recall, without_classes
from detector.evaluation.results import detections_to_coco, writers_of
from detector.evaluation.voc import voc_metrics
from detector.runtime import autocast, eval_mode
from detector.settings import COCO_LIMITS
from detector.structures import Detections, to_device
from detector.threads import follow

log = logging.getLogger(__name__)
TELL_EVERY = 30.0  # seconds


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
    max_detections: Sequence[int] = COCO_LIMITS,
    detect: Callable[[nn.Module, Sequence[int | None]], tuple[dict[int, list[dict]], set[str]]] | None = None,
) -> tuple[dict, list[dict]]:
    """COCO metrics of `model` on `dataset`, and its results.

    loader: yields (Batch, Targets), all images of the data set; in a distributed run each rank's loader gives its own
    part, and an image that several ranks see counts once. dataset: a CocoDataset, whose truth is compared with.
    precision: fp32, or bf16/fp16 autocast. iou_types: what to measure; None: boxes, and masks or keypoints where model
    and data set have them. Besides those of coco_metrics there is "voc": VOC's AP of boxes. Boxes and masks of a data
    set with LVIS's lists of checked categories are measured by LVIS's federated AP. "attributes": see attributes.py.
    folder: predictions.json and metrics.json are written there, the former before anything is measured. sigmas: of
    keypoints, and max_detections: see coco_metrics; LVIS's AP always takes 300. detect(model, category_ids): gives what
    `predict` gives, in its place; `loader` is not used then. `fit.rehearse` tells beforehand whether all this can be
    measured.

    A model without a box head is measured by its proposals, whatever their class, with "AR300" and "AR1000" beside the
    usual numbers.

    Returns ({iou type: the numbers of coco_metrics}, with "per_class": {iou type: {name: numbers}} beside them) on
    every rank, and the COCO results on rank 0 (an empty list elsewhere). The model's training mode is as it was before.
    """
    device = torch.device(device)
    proposals_only = getattr(model, "box_head", model) is None
    category_ids = [OBJECT] if proposals_only else dataset.category_ids
    if detect is None:
        share = -(-len(dataset) // _world())
        found, kinds = predict(model, loader, category_ids, device, precision, paste, progress, share)
    else:
        with eval_mode(model):
            found, kinds = detect(model, category_ids)
    shards = _gather((found, kinds))
    outcome: list = [None]
    results: list[dict] = []
    if shards is not None:  # rank 0
        try:
            by_image = {image: entries for shard, _ in shards for image, entries in shard.items()}
            truth = ground_truth(dataset)
            images = sorted(truth.image_ids.tolist())
            if missing := [image for image in images if image not in by_image]:
                raise ValueError(
                    f"the loader left out {len(missing)} of {len(images)} images, ids {missing[:5]} among them"
                )
            results = Results(entry for image in images for entry in by_image[image])
            if folder is not None:
                write_json(Path(folder) / "predictions.json", results)
            if proposals_only:
                truth = without_classes(truth)
            if iou_types is None:
                iou_types = measurable(truth, set().union(*(kinds for _, kinds in shards)))
            outcome = [measure(truth, results, iou_types, evaluator, per_class, sigmas, max_detections)]
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
    total: int | None = None,
) -> tuple[dict[int, list[dict]], set[str]]:
    """COCO results by image id for all images of `loader`, `total` of them, and the IoU types that the model predicts.

    progress: rank 0 shows a bar on a terminal, elsewhere a line every TELL_EVERY seconds.
    """
    results: dict[int, list[dict]] = {}
    kinds, writers = {"bbox"}, writers_of(model)
    progress, told = progress and _rank() == 0, time.monotonic()
    bar = tqdm(total=total, desc="evaluate", unit="image", disable=None if progress else True, leave=False)
    with bar, eval_mode(model), torch.inference_mode(), autocast(device, precision):
        for batch, _ in loader:
            follow()
            detections = model(to_device(batch, device))
            kinds |= kinds_of(detections)
            results |= {image: [] for image in batch.image_ids.tolist()}
            for entry in detections_to_coco(detections, batch, category_ids, paste=paste, writers=writers):
                results[entry["image_id"]].append(entry)
            bar.update(len(batch.images))
            if progress and bar.disable and time.monotonic() - told > TELL_EVERY:
                told = time.monotonic()
                log.info("evaluated %d of %s images", len(results), total or "all")
    return results, kinds


def kinds_of(detections: Detections) -> set[str]:
    """What detections tell beside the box that can be measured."""
    there = {"segm": detections.masks is not None, "keypoints": detections.keypoints is not None}
    return {kind for kind, known in there.items() if known} | {"attributes"} & {*(detections.extra or ())}


def ground_truth(dataset) -> Truth:
    """What evaluation compares with: every object of the images of a data set. Raises ValueError if it has no truth."""
    truth = dataset.annotations.truth
    if truth is None:
        raise ValueError(f"{dataset.origin} was opened for training: what to compare with has not been kept")
    return truth.select(dataset.rows)


def measurable(truth: Truth, predicted: set[str]) -> list[str]:
    """Those of the predicted IoU types that objects of the data set have the truth for; the others are logged."""
    objects = ~truth.crowd
    known = {"segm": truth.has_mask(), "keypoints": truth.num_keypoints > 0}
    known["attributes"] = (truth.attributes >= 0).any(axis=1)
    kinds = [kind for kind in ("bbox", "segm", "keypoints", "attributes") if kind in predicted]
    for kind in [kind for kind in kinds if kind in known]:
        lacking = int((objects & ~known[kind]).sum())
        if lacking and lacking == objects.sum():
            log.warning("%s is not measured: none of the %d objects of the data set has it", kind, lacking)
            kinds.remove(kind)
        elif lacking and kind == "segm":
            log.warning("segm is measured without %d of %d objects, which have no mask", lacking, objects.sum())
    return kinds


def measure(
    annotations: dict | Truth,
    results: list[dict],
    iou_types: Sequence[str],
    evaluator: str,
    per_class: bool,
    sigmas: Sequence[float] | None = None,
    max_detections: Sequence[int] = COCO_LIMITS,
) -> dict:
    """The layout of metrics.json: {iou type: numbers} and, if asked for, {"per_class": {iou type: {name: numbers}}},
    with attributes {"per_attribute": {name: numbers}} beside it."""

    def numbers(kind: str) -> dict:
        if kind == "voc":
            return voc_metrics(annotations, results, per_class)
        if kind == "attributes":
            return attribute_metrics(check_annotations(annotations), results, per_class)
        if kind in ("bbox", "segm") and check_annotations(annotations, kind).federated:
            return lvis_metrics(annotations, results, kind, per_class)
        options = {"sigmas": sigmas, "max_detections": max_detections}
        return coco_metrics(annotations, results, kind, evaluator, per_class, **options)

    metrics = {kind: numbers(kind) for kind in iou_types}
    if per_class:
        metrics["per_class"] = {kind: metrics[kind].pop("per_class") for kind in iou_types if kind != "attributes"}
        if "attributes" in metrics:
            metrics["per_attribute"] = metrics["attributes"].pop("per_attribute")
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
