"""Mask Scoring R-CNN (Huang et al. 2019): a mask head that tells, too, how well each mask fits.

The IoU of a mask with its object is regressed from the RoI features and the mask itself; times the class score it is
the score of the mask (the paper's equation 1), by which mask AP ranks. The score of the box stays as it is.
Dimensions: N images, D detections per image, R RoIs, C channels, K classes, M side of a predicted mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.heads.box import SampledRoIs
from detector.heads.mask import MaskHead, MaskPrediction, with_masks
from detector.ops import losses
from detector.ops.boxes import area
from detector.ops.layers import init_kaiming, init_uniform
from detector.structures import Detections, Targets, rois_from_boxes


class MaskScorer(nn.Module):
    """Convolutions, the last one with stride 2, then fully connected layers: the IoU of the mask of each class.

    Args:
        in_channels, output_size: of the RoI features [R, C, h, w].
        num_classes: K.
        conv_channels, fc_channels: widths of the layers.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: tuple[int, int],
        num_classes: int,
        conv_channels: Sequence[int],
        fc_channels: Sequence[int],
    ):
        super().__init__()
        if not conv_channels or not fc_channels:
            raise ValueError("score_channels and score_fc: expected at least one layer of each")
        widths = [in_channels + 1, *conv_channels]
        last = len(conv_channels) - 1
        self.conv = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 + (i == last), padding=1) for i, (a, b) in enumerate(zip(widths, widths[1:]))
        )
        height, width = ((side + 1) // 2 for side in output_size)
        widths = [conv_channels[-1] * height * width, *fc_channels]
        self.fc = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.mask_iou = nn.Linear(fc_channels[-1], num_classes)
        init_kaiming(self.conv)
        init_uniform(self.fc)
        nn.init.normal_(self.mask_iou.weight, std=0.01)
        nn.init.zeros_(self.mask_iou.bias)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """IoU [R, K] of RoI features [R, C, h, w] and mask logits [R, 2h, 2w]."""
        hidden = torch.cat([features, F.max_pool2d(logits.sigmoid()[:, None], 2).to(features.dtype)], dim=1)
        for layer in self.conv:
            hidden = layer(hidden).relu_()
        hidden = hidden.flatten(1)
        for layer in self.fc:
            hidden = layer(hidden).relu_()
        return self.mask_iou(hidden)


class MaskScoringHead(MaskHead):
    """A mask head with a score for each mask.

    Args:
        score_channels, score_fc: widths of the convolutions and of the fully connected layers that tell the IoU.
        iou_weight: factor of their loss.
        settings: see MaskHead.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        score_channels: Sequence[int] = (256, 256, 256, 256),
        score_fc: Sequence[int] = (1024, 1024),
        iou_weight: float = 0.5,
        **settings: Any,
    ):
        super().__init__(in_channels, strides, num_classes, **settings)
        if not iou_weight > 0:
            raise ValueError(f"iou_weight={iou_weight}: must be positive")
        op = self.extractor.op
        channels = op.output_channels(in_channels)
        self.scorer = MaskScorer(channels, op.output_size, num_classes, score_channels, score_fc)
        self.iou_weight = iou_weight

    def losses_of(
        self, logits: Tensor, prediction: MaskPrediction, positives: SampledRoIs, targets: Targets
    ) -> dict[str, Tensor]:
        """loss_mask, and loss_mask_iou: the squared error of the IoU, of masks that meet their object."""
        found = super().losses_of(logits, prediction, positives, targets)
        wanted = self.true_iou(logits, positives, targets)
        weight = positives.weight * positives.of_targets(targets.has_mask) * (wanted > 0)
        error = (self.predicted_iou(prediction, logits, positives.labels) - wanted).square()
        count = losses.global_mean_count(weight.sum())
        return found | {"loss_mask_iou": self.iou_weight * (error * weight).sum() / count}

    def predicted_iou(self, prediction: MaskPrediction, logits: Tensor, labels: Tensor) -> Tensor:
        """The IoU [R] that the masks of logits [R, M, M] seem to have, of the classes labels [R]."""
        ious = self.scorer(prediction.roi_features.features, logits).float()
        return ious.gather(1, (labels - 1).clamp(min=0)[:, None])[:, 0]

    @torch.no_grad()
    def true_iou(self, logits: Tensor, positives: SampledRoIs, targets: Targets) -> Tensor:
        """The IoU [R] that the masks of logits [R, M, M] have with the whole objects, what lies beyond the RoI too, in
        cells of the RoI."""
        truth = self.targets(positives, targets, logits.shape[1:]) >= 0.5
        masks, windows = positives.of_targets(targets.masks), positives.of_targets(targets.mask_windows)
        mask, rois = logits > 0, positives.rois[:, 1:]
        shared, own = (mask & truth).sum((1, 2)), mask.sum((1, 2))
        whole = masks.float().mean((1, 2)) * area(windows) / area(rois).clamp(min=1e-6) * mask[0].numel()
        whole = torch.maximum(whole, truth.sum((1, 2)))  # of the same object: never less than what the RoI shows
        return shared / (own + whole - shared).clamp(min=1)

    def scores(self, prediction: MaskPrediction, logits: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
        """Scores [R] of the masks of logits [R, M, M], of detections with labels [R] and scores [R]."""
        return scores * self.predicted_iou(prediction, logits, labels)

    def detect(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        """`detections` with masks [N, D, M, M] and their scores, `mask_score` [N, D]."""
        valid = detections.valid
        labels = detections.labels[valid]
        prediction = self(features, rois_from_boxes(detections.boxes, valid))
        logits = self.logits(prediction, labels)
        scores = torch.zeros_like(detections.scores)
        scores[valid] = self.scores(prediction, logits, labels, detections.scores[valid])
        return with_masks(detections, logits.float().sigmoid())._replace(extra={"mask_score": scores})
