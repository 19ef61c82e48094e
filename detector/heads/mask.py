"""The mask branch (Mask R-CNN, He et al. 2017): RoI features -> convolutions -> M x M logits per class.

Dimensions: N images, G ground-truth objects, R RoIs, K classes, S side of a stored mask, M side of a predicted one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from detector.heads.box import SampledRoIs
from detector.heads.trunk import ConvTrunk
from detector.ops import losses
from detector.ops.layers import bias_of, init_kaiming, pointwise_relu
from detector.protocols import Trunk
from detector.roi import RoIExtractor, RoIOp, make_op
from detector.structures import Detections, RoIFeatures, Targets, rois_from_boxes


class MaskPrediction(NamedTuple):
    hidden: Tensor  # [R, C, h, w], from which the predictor makes the logits of a class, once that is known
    roi_features: RoIFeatures


class MaskPredictor(nn.Module):
    """A transposed convolution that doubles the resolution of [R, in_channels, h, w], then 1 x 1 logits."""

    def __init__(self, in_channels: int, channels: int, num_masks: int):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, channels, 2, stride=2)
        self.mask_logits = nn.Conv2d(channels, num_masks, 1)
        init_kaiming(self)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Logits [R, 2h, 2w] of hidden [R, in_channels, h, w] for the classes labels [R] in 1..K, and for no other.

        A transposed convolution whose stride is its kernel is one of 1 x 1: each cell makes its own 2 x 2 cells.
        """
        weight = self.upsample.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [2 * 2 * channels, in_channels]
        cells = pointwise_relu(hidden, weight[:, :, None, None], bias_of(self.upsample).repeat(4))
        cells = cells.permute(0, 2, 3, 1).unflatten(-1, (4, -1))  # [R, h, w, 2 * 2, channels]
        which = torch.zeros_like(labels) if self.mask_logits.out_channels == 1 else (labels - 1).clamp(min=0)
        of_class, bias = self.mask_logits.weight[which].flatten(1), bias_of(self.mask_logits)[which]
        logits = cells.flatten(1, 3) @ of_class[:, :, None] + bias[:, None, None]
        rows, height, width = len(hidden), *hidden.shape[2:]
        return logits.view(rows, height, width, 2, 2).transpose(2, 3).reshape(rows, 2 * height, 2 * width)


class MaskHead(nn.Module):
    """Masks of RoIs.

    Args:
        in_channels, strides, num_classes: of the features and the data set, given by the model.
        roi: factory of a RoI method, `roi(output_size)` or `roi(output_size, channels=...)`.
        output_size: bins of a RoI, k or (h, w); a predicted mask has twice as many on each side.
        trunk: factory `trunk(in_channels, output_size)` of a module with `out_channels` that keeps the resolution.
        upsample_channels: width of the transposed convolution.
        level_rule, canonical_level, canonical_size: FPN level assignment, see RoIExtractor.
        class_agnostic: one mask for all classes instead of one per class.
        target_threshold: mask targets are the share of a bin that the object covers, made 0 or 1 at this threshold;
            None keeps the share.
        target_aligned: half-pixel-correct sampling of the targets; False is the legacy of torchvision's Mask R-CNN.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        roi: Callable[..., RoIOp],
        output_size: int | Sequence[int] = 14,
        trunk: Callable[..., Trunk] = ConvTrunk,
        upsample_channels: int = 256,
        level_rule: str = "detectron2",
        canonical_level: int = 4,
        canonical_size: int = 224,
        class_agnostic: bool = False,
        target_threshold: float | None = 0.5,
        target_aligned: bool = True,
    ):
        super().__init__()
        op = make_op(roi, output_size, channels=in_channels, levels=len(strides))
        self.extractor = RoIExtractor(op, strides, level_rule, canonical_level, canonical_size)
        self.trunk = trunk(op.output_channels(in_channels), op.output_size)
        self.predictor = MaskPredictor(self.trunk.out_channels, upsample_channels, 1 if class_agnostic else num_classes)
        self.target_threshold, self.target_aligned = target_threshold, target_aligned

    @property
    def stages(self) -> tuple[MaskHead, ...]:
        """A cascade may have several: see CascadeMaskHead."""
        return (self,)

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> MaskPrediction:
        """Predictions for rois [R, 5] = (batch_index, x1, y1, x2, y2)."""
        roi_features = self.extractor(features, rois)
        return MaskPrediction(self.trunk(roi_features.features), roi_features)

    def losses(self, prediction: MaskPrediction, positives: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """loss_mask of the predictions for `positives`; objects without a mask do not count."""
        logits = self.predictor(prediction.hidden, positives.labels)
        return self.losses_of(logits, prediction, positives, targets)

    def losses_of(
        self, logits: Tensor, prediction: MaskPrediction, positives: SampledRoIs, targets: Targets
    ) -> dict[str, Tensor]:
        """The same, of the predicted logits [R, M, M] of the objects' classes."""
        weight = positives.weight * positives.of_targets(targets.has_mask)
        count = losses.global_mean_count(weight.sum())
        return {"loss_mask": losses.mask(logits, self.targets(positives, targets, logits.shape[1:]), weight, count)}

    def targets(self, positives: SampledRoIs, targets: Targets, size: Sequence[int]) -> Tensor:
        """What `positives` should predict, [R, *size] float."""
        return mask_targets(positives, targets, size, self.target_threshold, self.target_aligned)

    def detect(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        """`detections` with masks [N, D, M, M]: probabilities of each detection's label in its box's frame."""
        prediction = self(features, rois_from_boxes(detections.boxes, detections.valid))
        logits = self.logits(prediction, detections.labels[detections.valid])
        return with_masks(detections, logits.float().sigmoid())

    def logits(self, prediction: MaskPrediction, labels: Tensor) -> Tensor:
        """Logits [R, M, M] of the classes labels [R]."""
        # a few at a time, or the predictor's wide maps fall out of a CPU's cache
        parts = zip(prediction.hidden.split(32), labels.split(32))
        return torch.cat([self.predictor(*part) for part in parts])


@torch.no_grad()
def mask_targets(
    positives: SampledRoIs, targets: Targets, size: Sequence[int], threshold: float | None, aligned: bool = True
) -> Tensor:
    """The matched objects' masks seen through the RoIs, [R, *size] float; threshold, aligned: see MaskHead."""
    masks, window = positives.of_targets(targets.masks), positives.of_targets(targets.mask_windows)
    # The RoI in cells of the stored grid, which covers its window of the image. A frame of zeros keeps what lies
    # beside the window from being read as its edge.
    scale = masks.shape[-1] / (window[:, 2:] - window[:, :2]).clamp(min=1e-6)
    boxes = (positives.rois[:, 1:].view(-1, 2, 2) - window[:, None, :2]) * scale[:, None] + 1
    rois = torch.cat([torch.arange(len(boxes), device=boxes.device)[:, None], boxes.flatten(1)], dim=1)
    framed = F.pad(masks[:, None].float(), (1, 1, 1, 1))
    target = roi_align(framed, rois, tuple(size), 1.0, -1, aligned)[:, 0]
    return target if threshold is None else (target >= threshold).float()


def with_masks(detections: Detections, found: Tensor) -> Detections:
    """The detections with masks, of probabilities [R, M, M], one for each that is valid."""
    masks = found.new_zeros(*detections.valid.shape, *found.shape[1:])
    masks[detections.valid] = found
    return detections._replace(masks=masks)
