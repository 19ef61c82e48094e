"""Cascade R-CNN (Cai and Vasconcelos 2018): box heads in a row, each refining the boxes of the one before.

Each is trained on its own RoIs with a higher IoU threshold, so that it sees boxes as good as those it will get.
Dimensions: N images, P proposals, R RoIs, K classes, T stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detector.heads.box import BoxHead, BoxPrediction, SampledRoIs
from detector.heads.mask import MaskHead, MaskPrediction
from detector.ops.boxes import clip
from detector.ops.checks import check_choice
from detector.ops.layers import module_list
from detector.ops.sampling import IGNORED, POSITIVE, match
from detector.structures import Batch, Detections, Proposals, RoIFeatures, Targets, rois_from_boxes


class CascadePrediction(NamedTuple):
    stages: list[BoxPrediction]
    rois: list[Tensor]  # T x [R, 5]: what each stage looked at
    refined: Tensor  # [R, 5]: what the last one makes of it
    roi_features: RoIFeatures  # the first stage's features; offsets of all stages side by side


class CascadeBoxHead(nn.Module):
    """Box heads in a row, with class-agnostic boxes.

    Args:
        in_channels, strides, num_classes: of the features and the data set, given by the model.
        coder_weights: weights of the four deltas, for each stage.
        positive_iou: matching threshold of each stage.
        stage_weights: of the stages' losses in the sum.
        average: whether the stages' 'probability' (detectron2) or 'logit' (mmdetection) is averaged at inference.
        settings: of every stage, see BoxHead.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        coder_weights: Sequence[Sequence[float]] = ((10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)),
        positive_iou: Sequence[float] = (0.5, 0.6, 0.7),
        stage_weights: Sequence[float] = (1.0, 0.5, 0.25),
        average: str = "probability",
        **settings: Any,
    ):
        super().__init__()
        check_choice("average", average, ("probability", "logit"))
        if not len(coder_weights) == len(positive_iou) == len(stage_weights):
            raise ValueError(
                f"coder_weights, positive_iou and stage_weights must be of one length, one entry per stage, got "
                f"{len(coder_weights)}, {len(positive_iou)}, {len(stage_weights)}"
            )
        self.stages = module_list(
            BoxHead(
                in_channels,
                strides,
                num_classes,
                class_agnostic=True,
                coder_weights=weights,
                positive_iou=iou,
                negative_iou=iou,
                **settings,
            )
            for weights, iou in zip(coder_weights, positive_iou)
        )
        self.stage_weights, self.average = list(stage_weights), average

    def forward(self, features: Sequence[Tensor], rois: Tensor, image_sizes: Tensor | None = None) -> CascadePrediction:
        """Predictions of all stages for rois [R, 5]; refined boxes are clipped to the image [N, 2], else to the map."""
        if image_sizes is None:
            frame = [self.stages[0].extractor.strides[0] * side for side in features[0].shape[-2:]]
            image_sizes = rois.new_tensor(frame).expand(len(features[0]), 2)
        sizes, seen, predictions = image_sizes[rois[:, 0].long()], [], []
        for stage in self.stages:
            prediction = stage(features, rois)
            seen.append(rois)
            predictions.append(prediction)
            boxes = stage.coder.decode(prediction.box_deltas[:, 0].detach(), rois[:, 1:])
            rois = torch.cat([rois[:, :1], clip(boxes, sizes)], dim=1)
        return CascadePrediction(predictions, seen, rois, side_by_side([p.roi_features for p in predictions]))

    def sample(self, proposals: Proposals, batch: Batch, targets: Targets) -> tuple[SampledRoIs, SampledRoIs]:
        """RoIs of the first stage; the later ones look at the same after refinement."""
        return self.stages[0].sample(proposals, batch, targets)

    def losses(self, prediction: CascadePrediction, sampled: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """loss_classifier and loss_box_reg, summed over the stages with their weights."""
        total: dict[str, Tensor] = {}
        for i, (stage, weight) in enumerate(zip(self.stages, self.stage_weights)):
            rows = sampled if i == 0 else relabel(sampled, prediction.rois[i], targets, stage.positive_iou)
            for name, loss in stage.losses(prediction.stages[i], rows, targets).items():
                total[name] = total.get(name, 0.0) + weight * loss
        return total

    def detect(self, features: Sequence[Tensor], proposals: Proposals, batch: Batch) -> Detections:
        """Detections [N, D]: the last stage's boxes with the stages' mean scores."""
        rois = rois_from_boxes(proposals.boxes, proposals.valid)
        candidates = self.candidates(features, rois, batch.image_sizes)
        return self.stages[-1].select(*candidates, rois[:, 0].long(), batch.image_sizes)

    def candidates(self, features: Sequence[Tensor], rois: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """As BoxHead's: boxes [R, 1, 4] and scores [R, K]."""
        prediction = self(features, rois, image_sizes)
        logits = torch.stack([stage.class_logits.float() for stage in prediction.stages])  # [T, R, K + 1]
        if self.average == "logit":
            scores = logits.mean(dim=0).softmax(dim=1)
        else:
            scores = logits.softmax(dim=2).mean(dim=0)
        boxes = self.stages[-1].coder.decode(prediction.stages[-1].box_deltas, prediction.rois[-1][:, None, 1:])
        return boxes, scores[:, 1:]


class CascadeMaskPrediction(NamedTuple):
    stages: list[MaskPrediction]
    roi_features: RoIFeatures  # as in CascadePrediction


class CascadeMaskHead(nn.Module):
    """A mask head per stage of the cascade, as mmdetection has them: losses are summed, probabilities averaged.

    Args:
        stage_weights: of the heads' losses in the sum; their number is the number of heads.
        settings: see MaskHead.
    """

    def __init__(self, *args: Any, stage_weights: Sequence[float] = (1.0, 0.5, 0.25), **settings: Any):
        super().__init__()
        self.stages = module_list(MaskHead(*args, **settings) for _ in stage_weights)
        self.stage_weights = list(stage_weights)

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> CascadeMaskPrediction:
        """Predictions of all heads for rois [R, 5]."""
        predictions = [stage(features, rois) for stage in self.stages]
        return CascadeMaskPrediction(predictions, side_by_side([p.roi_features for p in predictions]))

    def losses(self, prediction: CascadeMaskPrediction, positives: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """loss_mask, summed over the heads with their weights."""
        terms = [
            weight * stage.losses(of_stage, positives, targets)["loss_mask"]
            for stage, weight, of_stage in zip(self.stages, self.stage_weights, prediction.stages)
        ]
        return {"loss_mask": sum(terms[1:], terms[0])}

    def detect(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        """`detections` with the heads' mean masks [N, D, M, M]."""
        found = [stage.detect(features, detections).masks for stage in self.stages]
        return detections._replace(masks=torch.stack([masks for masks in found if masks is not None]).mean(dim=0))


def side_by_side(parts: Sequence[RoIFeatures]) -> RoIFeatures:
    """The first part's features, and the offsets and modulation of all parts, joined along their rows."""

    def join(tensors: list[Tensor | None], dim: int) -> Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(there, dim=dim) if there else None

    return RoIFeatures(parts[0].features, join([p.offsets for p in parts], 2), join([p.modulation for p in parts], 1))


@torch.no_grad()
def relabel(sampled: SampledRoIs, rois: Tensor, targets: Targets, iou: float) -> SampledRoIs:
    """The same rows after refinement to rois [R, 5]: matched anew, at another threshold."""
    image = rois[:, 0].long()
    own = Targets(targets.boxes[image], targets.labels[image], targets.valid[image], targets.crowd[image])
    matched_idxs, verdict, _ = (t[:, 0] for t in match(rois[:, None, 1:], own, iou, iou))  # a row is its own image here
    labels = own.labels.gather(1, matched_idxs[:, None])[:, 0] * (verdict == POSITIVE)
    return SampledRoIs(sampled.weight * (verdict != IGNORED), rois, labels, matched_idxs)
