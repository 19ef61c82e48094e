"""The second stage for boxes (Fast R-CNN, Girshick 2015): RoI features -> trunk -> class logits and box deltas.

Dimensions: N images, P proposals per image, G ground-truth boxes per image, R RoIs, K classes, D detections per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detector.heads.trunk import FCTrunk
from detector.ops import losses
from detector.ops.boxes import (
    BoxCoder,
    Survivors,
    clip,
    nms_by_image,
    nms_like_mmcv,
    of_label,
    soft_nms_by_image,
    survivors,
    take,
)
from detector.ops.checks import check_choice, check_counts, check_fractions
from detector.ops.layers import init_normal
from detector.ops.sampling import IGNORED, Matches, check_thresholds, match, sample
from detector.protocols import Trunk
from detector.roi import RoIExtractor, RoIOp, make_op
from detector.structures import (
    Batch,
    Detections,
    Proposals,
    RoIFeatures,
    Targets,
    flatten_valid,
    rois_from_boxes,
    with_image,
)


class SampledRoIs(NamedTuple):
    """What a training step looks at, as rows; `weight` is 1 for a sampled RoI and 0 for padding, an empty RoI."""

    weight: Tensor  # [R] float
    rois: Tensor  # [R, 5] = (batch_index, x1, y1, x2, y2)
    labels: Tensor  # [R] int64, 0 for negatives
    matched_idxs: Tensor  # [R] the ground-truth box of its image that the RoI answers for

    def of_targets(self, values: Tensor | None) -> Tensor:
        """The rows [R, ...] of values [N, G, ...] that belong to the matched ground truth."""
        if values is None:
            raise ValueError("the targets lack what a head learns from: masks or keypoints")
        return values[self.rois[:, 0].long(), self.matched_idxs]

    def emptied(self) -> SampledRoIs:
        """The same, padding as empty RoIs: else it could look for an object with which it has nothing in common."""
        boxes = torch.where(self.weight[:, None] > 0, self.rois[:, 1:], 0)
        return self._replace(rois=torch.cat([self.rois[:, :1], boxes], dim=1))

    def without_padding(self) -> SampledRoIs:
        """The sampled RoIs alone, for whose number the host waits."""
        real = torch.nonzero(self.weight)[:, 0]
        return SampledRoIs(*(values[real] for values in self))


class BoxPrediction(NamedTuple):
    class_logits: Tensor  # [R, K + 1]
    box_deltas: Tensor  # [R, K, 4], or [R, 1, 4] if class-agnostic
    roi_features: RoIFeatures


class BoxPredictor(nn.Module):
    """Two linear layers on the trunk's output [R, in_channels], that of the boxes on [R, box_channels] where given.

    Args:
        init: their first weights, see BoxHead's `predictor_init`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        class_agnostic: bool,
        init: str = "small",
        box_channels: int | None = None,
    ):
        super().__init__()
        check_choice("predictor_init", init, ("small", "fan_in"))
        self.class_logits = nn.Linear(in_channels, num_classes + 1)
        self.box_deltas = nn.Linear(box_channels or in_channels, 4 if class_agnostic else 4 * num_classes)
        if init == "small":  # "fan_in" is how linear layers come
            init_normal(self.class_logits, std=0.01)
            init_normal(self.box_deltas, std=0.001)

    def forward(self, hidden: Tensor, of_boxes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        deltas = self.box_deltas(hidden if of_boxes is None else of_boxes)
        return self.class_logits(hidden), deltas.unflatten(1, (-1, 4))


class BoxHead(nn.Module):
    """Classify and refine proposals.

    Args:
        in_channels, strides, num_classes: of the features and the data set, given by the model.
        roi: factory of a RoI method, `roi(output_size)` or `roi(output_size, channels=...)`.
        output_size: bins of a RoI, k or (h, w).
        trunk: factory `trunk(in_channels, output_size)` of a module with `out_channels`, from RoI features to [R, C].
        level_rule, canonical_level, canonical_size: FPN level assignment, see RoIExtractor.
        class_agnostic: one box for all classes instead of one per class.
        coder_weights: weights of the four deltas.
        batch_size_per_image, positive_fraction, positive_iou, negative_iou: RoIs that enter the loss.
        add_ground_truth: ground-truth boxes join the proposals in training.
        box_loss, beta: see losses.BoxLoss.
        class_loss: factory `class_loss(num_classes)` of a module like losses.CrossEntropy.
        class_weights: [K] factors on the loss of RoIs of each class; `training.class_weights` makes them. None: all 1.
        score_threshold, nms_threshold, detections_per_image: of inference.
        nms: 'hard' removes boxes, 'mmcv' too, in mmcv's order of equal scores; 'linear' and 'gaussian' soft-NMS (Bodla
            et al. 2017) lower their scores.
        nms_agnostic: boxes of different classes compete too.
        min_size: detections with a shorter side, in pixels, are dropped,
        min_size_last: after NMS, in which they take part, as in detectron2.
        clamp_shrinking: see BoxCoder.
        predictor_init: the predictors' first weights: 'small', normal with 0.01 for the classes and 0.001 for the boxes
            (Fast R-CNN, section 2.3), or 'fan_in', uniform within 1 / sqrt(channels) (LeCun et al. 1998), from which
            short trainings from random weights learn faster.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        roi: Callable[..., RoIOp],
        output_size: int | Sequence[int] = 7,
        trunk: Callable[..., Trunk] = FCTrunk,
        level_rule: str = "detectron2",
        canonical_level: int = 4,
        canonical_size: int = 224,
        class_agnostic: bool = False,
        coder_weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        batch_size_per_image: int = 512,
        positive_fraction: float = 0.25,
        positive_iou: float = 0.5,
        negative_iou: float = 0.5,
        add_ground_truth: bool = True,
        box_loss: str = "smooth_l1",
        beta: float = 1.0 / 9,
        class_loss: Callable[..., nn.Module] = losses.CrossEntropy,
        class_weights: Sequence[float] | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections_per_image: int = 100,
        nms: str = "hard",
        nms_agnostic: bool = False,
        min_size: float = 0.0,
        min_size_last: bool = False,
        clamp_shrinking: bool = False,
        predictor_init: str = "small",
    ):
        super().__init__()
        check_thresholds(negative_iou, positive_iou)
        check_fractions(
            positive_fraction=positive_fraction, score_threshold=score_threshold, nms_threshold=nms_threshold
        )
        check_counts(batch_size_per_image=batch_size_per_image, detections_per_image=detections_per_image)
        check_choice("nms", nms, ("hard", "mmcv", "linear", "gaussian"))
        op = make_op(roi, output_size, channels=in_channels, levels=len(strides))
        self.extractor = RoIExtractor(op, strides, level_rule, canonical_level, canonical_size)
        self.trunk = trunk(op.output_channels(in_channels), op.output_size)
        self.predictor = BoxPredictor(self.trunk.out_channels, num_classes, class_agnostic, predictor_init)
        self.coder = BoxCoder(coder_weights, clamp_shrinking=clamp_shrinking)
        self.box_loss = losses.BoxLoss(self.coder, box_loss, beta)
        self.class_loss = class_loss(num_classes)
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(f"class_weights={list(class_weights)}: expected {num_classes} numbers, one for each class")
        factors = None if class_weights is None else torch.tensor([1.0, *class_weights])
        self.register_buffer("class_weights", factors, persistent=False)  # [K + 1], background first
        self.batch_size_per_image, self.positive_fraction = batch_size_per_image, positive_fraction
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.add_ground_truth = add_ground_truth
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.detections_per_image = detections_per_image
        self.min_size, self.min_size_last = min_size, min_size_last
        self.nms, self.nms_agnostic = nms, nms_agnostic

    @property
    def stages(self) -> tuple[BoxHead, ...]:
        """A cascade has several: see CascadeBoxHead."""
        return (self,)

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> BoxPrediction:
        """Predictions for rois [R, 5] = (batch_index, x1, y1, x2, y2)."""
        roi_features = self.extractor(features, rois)
        class_logits, box_deltas = self.predictor(self.trunk(roi_features.features))
        return BoxPrediction(class_logits, box_deltas, roi_features)

    @torch.no_grad()
    def sample(self, proposals: Proposals, batch: Batch, targets: Targets) -> tuple[SampledRoIs, SampledRoIs]:
        """Draw RoIs from the proposals [N, P] and the ground truth [N, G]: all of them, and the positives alone."""
        boxes, valid = proposals.boxes, proposals.valid
        if self.add_ground_truth:
            # Behind the proposals: the order of the draw must not depend on how far the ground truth is padded.
            boxes = torch.cat([boxes, targets.boxes], dim=1)
            valid = torch.cat([valid, targets.valid & ~targets.crowd], dim=1)
        matches = self.match(boxes, valid, targets)
        verdict = torch.where(valid, matches.verdict, IGNORED)
        drawn = sample(verdict, batch.sample_keys, self.batch_size_per_image, self.positive_fraction, stage=1)
        matched_idxs = take(matches.matched_idxs, drawn.indices)
        labels = take(targets.labels, matched_idxs) * drawn.positive
        rows = with_image(take(boxes, drawn.indices)), labels, matched_idxs
        most = int(self.batch_size_per_image * self.positive_fraction)  # positives come first
        positives = flatten_valid(drawn.positive[:, :most], *(t[:, :most] for t in rows))
        return SampledRoIs(*flatten_valid(drawn.valid, *rows)).emptied(), SampledRoIs(*positives).emptied()

    def match(self, boxes: Tensor, valid: Tensor, targets: Targets) -> Matches:
        """Boxes [N, P], those that are `valid`, to the ground truth."""
        return match(boxes, targets, self.negative_iou, self.positive_iou)

    def losses(self, prediction: BoxPrediction, sampled: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """loss_classifier and loss_box_reg of the predictions for `sampled`."""
        labels, weight, deltas = sampled.labels, sampled.weight, of_label(prediction.box_deltas, sampled.labels)
        count = losses.global_mean_count(weight.sum())
        gt_boxes, boxes = sampled.of_targets(targets.boxes), sampled.rois[:, 1:]
        factors = weight if self.class_weights is None else weight * self.class_weights[labels]
        classifier = self.class_loss(prediction.class_logits.float(), labels, weight)
        return {
            "loss_classifier": (classifier * factors).sum() / count,
            "loss_box_reg": self.box_loss(deltas, gt_boxes, boxes, weight * (labels > 0), count),
        }

    def detect(self, features: Sequence[Tensor], proposals: Proposals, batch: Batch) -> Detections:
        """Detections [N, D] of the proposals: score threshold, NMS per class, best D of each image."""
        rois = rois_from_boxes(proposals.boxes, proposals.valid)
        return self.select(*self.candidates(features, rois, batch.image_sizes), rois[:, 0].long(), batch.image_sizes)

    def candidates(self, features: Sequence[Tensor], rois: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [R, K or 1, 4], not clipped, and scores [R, K] of rois [R, 5] on images of image_sizes [N, 2]."""
        prediction = self(features, rois)
        scores = prediction.class_logits.float().softmax(dim=1)[:, 1:]
        return self.coder.decode(prediction.box_deltas, rois[:, None, 1:]), scores

    def select(
        self,
        boxes: Tensor,
        scores: Tensor,
        image: Tensor,
        image_sizes: Tensor,
        suppress: Callable[..., Survivors] = survivors,
    ) -> Detections:
        """The best of boxes [R, K or 1, 4] with scores [R, K] on image [R]: clip, threshold, suppress.

        suppress: `ops.boxes.survivors`, or what stands for it in an exported program.
        """
        images, limit = len(image_sizes), self.detections_per_image
        if len(boxes) == 0:
            empty = scores.new_zeros(images, limit)
            return Detections(empty[..., None].expand(-1, -1, 4), empty, empty.long(), empty.bool())
        boxes = clip(boxes, image_sizes[image]).expand(-1, scores.shape[1], -1)
        large = (boxes[..., 2:] - boxes[..., :2] > self.min_size).all(-1)
        wanted = (scores > self.score_threshold) & (large | self.min_size_last)
        group = torch.arange(scores.shape[1], device=scores.device) * (not self.nms_agnostic)
        soft = partial(soft_nms_by_image, decay=self.nms, min_score=self.score_threshold)
        nms: Callable[..., tuple[Tensor, ...]] = {"hard": nms_by_image, "mmcv": nms_like_mmcv}.get(self.nms, soft)
        args = (image, group.expand_as(scores), nms, self.nms_threshold, images, limit)
        found = suppress(boxes, scores, wanted, *args)
        found = found._replace(valid=found.valid & large[found.row, found.column])
        return Detections(found.of(boxes), found.scores * found.valid, (found.column + 1) * found.valid, found.valid)
