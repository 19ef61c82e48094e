"""Whether a model and a data set fit: what cannot be learnt or measured is refused before anything long begins.

Every message names the setting, what the data have, and the settings that mend it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from detector.evaluation.coco import coco_sigmas
from detector.evaluation.evaluator import ground_truth, measurable, measure
from detector.evaluation.proposals import proposal_recall, without_classes
from detector.heads import AttributeHead
from detector.ops.checks import ConfigError
from detector.settings import COCO_LIMITS, LVIS_LIMIT

log = logging.getLogger(__name__)

NEEDS = {"bbox": "bbox", "voc": "bbox", "segm": "segm", "boundary": "segm", "keypoints": "keypoints"}
NEEDS["attributes"] = "attributes"
NAMES = {"segm": "masks", "keypoints": "keypoints", "attributes": "attributes"}


def check_training(model: nn.Module, dataset: Any) -> None:
    """Raise ConfigError where a head of the model has nothing to learn from a CocoDataset, or other keypoints."""
    found, file = dataset.annotations, dataset.origin
    if model.mask_head is not None:
        way_out = "model.mask_head=null trains boxes alone"
        if not dataset.masks:
            raise ConfigError(
                f"data.masks = False: model.mask_head learns from masks; data.masks=true reads them, {way_out}"
            )
        if not len(found.points):
            raise ConfigError(
                f"data.train: no object of {file} has a segmentation, which model.mask_head learns from; {way_out}"
            )
    if model.keypoint_head is not None:
        way_out = "model.keypoint_head=null trains without"
        if not found.keypoint_names:
            raise ConfigError(
                f"data.keypoints = False: model.keypoint_head learns from keypoints; data.keypoints=true reads them, "
                f"{way_out}"
            )
        if not (found.keypoints[..., 2] > 0).any():
            raise ConfigError(
                f"data.train: no object of {file} has a keypoint that is labelled (of visibility 1 or 2), which "
                f"model.keypoint_head learns from; {way_out}"
            )
        check_keypoints(num_keypoints(model), found.keypoint_names, file)
    for name, head in attribute_heads(model).items():
        key, way_out = f"model.extra_heads.{name}", f"~model.extra_heads.{name} trains without"
        if not dataset.attributes:
            raise ConfigError(
                f"data.attributes = False: {key} learns from attributes; data.attributes=true reads them, {way_out}"
            )
        if not (found.attributes >= 0).any():
            raise ConfigError(f"data.train: no object of {file} has attributes, which {key} learns from; {way_out}")
        if head.groups != found.attribute_groups:
            raise ConfigError(
                f"{key}.attributes = {head.groups}: {file} has {found.attribute_groups}; null takes the data's, and "
                f"data.attributes={[group[0] for group in head.groups]} only those"
            )


def attribute_heads(model: nn.Module) -> dict[str, AttributeHead]:
    return {name: head for name, head in model.extra_heads.items() if isinstance(head, AttributeHead)}


def attribute_groups(model: nn.Module) -> list[list[str]] | None:
    """What a model tells apart, as data sets are read for it; None for one without such a head."""
    return next((head.groups for head in attribute_heads(model).values()), None)


def num_keypoints(model: nn.Module) -> int:
    return model.keypoint_head.predictor.out_channels


def check_keypoints(count: int, names: Sequence[str], file: Any, trained: Sequence[str] | None = None) -> None:
    """Raise ConfigError unless a model of `count` keypoints, of the names `trained` where these are known, fits the
    keypoints of a file."""
    if count != len(names):
        raise ConfigError(
            f"model.keypoint_head.num_keypoints = {count}: {file} has {len(names)} keypoints ({', '.join(names)}). "
            f"To train for them, model.keypoint_head.num_keypoints={len(names)} or null, the data's number; "
            "to evaluate the boxes of a model for others, iou_types=[bbox]"
        )
    if trained is not None and list(trained) != list(names):
        raise ConfigError(
            f"data.val: the keypoints of {file} are {', '.join(names)}; those of the training set are "
            f"{', '.join(trained)}. Keypoints are told apart by their order: mend it in one of the files, in the "
            "category's list and in the numbers; iou_types=[bbox] evaluates the boxes of a checkpoint without it"
        )


def rehearse(
    model: nn.Module,
    dataset: Any,
    evaluator: str = "hotcoco",
    iou_types: Sequence[str] | None = None,
    sigmas: Sequence[float] | None = None,
    keypoint_names: Sequence[str] | None = None,
    where: str = "",
    max_detections: Sequence[int] = COCO_LIMITS,
) -> dict[str, dict[str, float]]:
    """Evaluate `model` on a CocoDataset as if it had found nothing: {iou type: {name: value}} of all that will be
    measured.

    iou_types, sigmas, max_detections: the settings of these names, below the node `where` ("evaluation.") of the
    configuration.
    keypoint_names: what the model learns, in its order; None where that is not known.

    Raises ConfigError where the model or the data cannot give what is asked for, ValueError and TypeError for truth
    that cannot be used.
    """
    proposals_only = model.box_head is None
    truth = without_classes(ground_truth(dataset)) if proposals_only else ground_truth(dataset)
    names = dataset.annotations.keypoint_names
    heads = {"bbox": True, "segm": model.mask_head is not None, "keypoints": model.keypoint_head is not None and names}
    heads["attributes"] = bool(attribute_heads(model))
    predicted = {kind for kind, there in heads.items() if there}
    kinds = measurable(truth, predicted)
    if iou_types is not None:
        check_iou_types(iou_types, predicted, kinds, f"{where}iou_types", dataset.origin)
        kinds = list(iou_types)
    if "keypoints" in kinds:
        check_keypoints(num_keypoints(model), names, dataset.origin, keypoint_names)
        if sigmas is None and len(names) != len(coco_sigmas(17)):
            log.info(
                "keypoints are measured with the fall-off %.4f for each, the mean of COCO's; %ssigmas sets others",
                *(coco_sigmas(len(names))[0], where),
            )
    if sigmas is not None:
        check_sigmas(sigmas, names if "keypoints" in kinds else [], f"{where}sigmas")
    check_counted(max_detections, kinds, truth.federated, f"{where}max_detections")
    metrics = measure(truth, [], kinds, evaluator, False, sigmas, max_detections)
    if proposals_only and "bbox" in metrics:
        metrics["bbox"] |= proposal_recall(truth, [])
    return metrics


def check_iou_types(iou_types: Sequence[str], predicted: set[str], kinds: Sequence[str], key: str, file: Any) -> None:
    """Raise ConfigError unless all `iou_types` are among what the model predicts and the data have the truth for."""
    choices = f"choose among {', '.join(t for t in NEEDS if NEEDS[t] in kinds)}, each once; null takes what there is"
    given = f"{key} = {list(iou_types)}"
    if not iou_types or len(set(iou_types)) < len(iou_types):
        wrong = "a type is there twice" if iou_types else "nothing would be measured"
        raise ConfigError(f"{given}: {wrong}; {choices}")
    for kind in iou_types:
        need = NEEDS[kind]
        if need not in kinds:
            who = f"no object of {file} has" if need in predicted else "the model does not predict"
            raise ConfigError(f"{given}: {kind!r} needs {NAMES[need]}, which {who}; {choices}")


def check_counted(limits: Sequence[int], kinds: Sequence[str], federated: bool, key: str) -> None:
    """Raise ConfigError for other `limits` than COCO's where an AP is measured that has its own: of LVIS's data always,
    of VOC's if nothing else is measured."""
    if tuple(limits) == COCO_LIMITS:
        return
    given, usual = f"{key} = {list(limits)}", f"{key}={list(COCO_LIMITS)}".replace(" ", "")
    if federated and {"bbox", "segm"} & set(kinds):
        raise ConfigError(
            f"{given}: the data have LVIS's lists, and LVIS's AP counts the best {LVIS_LIMIT} detections of an image, "
            f"whatever their class; {usual} leaves it so, model.box_head.detections_per_image={LVIS_LIMIT} lets the "
            "model give as many"
        )
    if set(kinds) == {"voc"}:
        raise ConfigError(
            f"{given}: VOC's AP counts all that the model gives; {usual} leaves it so, "
            f"model.box_head.detections_per_image={limits[-1]} lets the model give as many"
        )


def check_sigmas(sigmas: Sequence[float], names: Sequence[str], key: str) -> None:
    """Raise ConfigError unless there is one positive number for each of the keypoints that are measured."""
    given = f"{key} = {list(sigmas)}"
    if not names:
        raise ConfigError(f"{given}: no keypoints are measured; {key}=null")
    if len(sigmas) != len(names) or min(sigmas) <= 0:
        raise ConfigError(f"{given}: must be {len(names)} positive numbers, one for each of {', '.join(names)}")
