"""Hybrid Task Cascade (Chen et al. 2019), without its branch of semantic segmentation, which few data have truth for.

A mask head for each stage of a cascade of boxes. They are interleaved: a stage's masks are learnt on the boxes that the
stage has just refined, not on those that it was given. And mask information flows: each head sees, beside its RoI
features, what the head before it made of them, which saw the one before it (figure 2d).
Dimensions: R RoIs, B of them for each stage, T stages, C channels, N images, D detections per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detector.heads.box import SampledRoIs
from detector.heads.cascade import CascadeBoxHead, CascadePrediction, relabel
from detector.heads.mask import MaskHead, MaskPrediction, with_masks
from detector.ops.layers import init_kaiming, learns_statistics, module_list
from detector.structures import Detections, RoIFeatures, Targets, rois_from_boxes


class HybridMaskPrediction(NamedTuple):
    stages: list[MaskPrediction]
    roi_features: RoIFeatures  # of all stages' RoIs, one after the other


class HybridMaskHead(nn.Module):
    """Interleaved mask heads with mask information flow.

    Args:
        in_channels, strides, num_classes: of the features and the data set, given by the model.
        stage_weights: of the heads' losses in the sum; their number is the number of heads, the box head's stages.
        settings: see MaskHead.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        stage_weights: Sequence[float] = (1.0, 0.5, 0.25),
        **settings: Any,
    ):
        super().__init__()
        heads = [MaskHead(in_channels, strides, num_classes, **settings) for _ in stage_weights]
        self.stages = module_list(heads)
        channels = heads[0].trunk.out_channels, heads[0].extractor.op.output_channels(in_channels)
        self.flow = module_list(nn.Conv2d(*channels, 1) for _ in heads[1:])  # from each head to the next
        for layer in self.flow:
            init_kaiming(layer)
        self.stage_weights = list(stage_weights)

    @torch.no_grad()
    def interleaved(
        self, box_head: CascadeBoxHead, prediction: CascadePrediction, sampled: SampledRoIs, targets: Targets
    ) -> SampledRoIs:
        """RoIs for a training step [T B]: those that each stage of the box head has refined onto objects.

        On the CPU B is the largest number that a stage has; elsewhere as many as the first may have, so that nothing
        has to wait for their number. What is too little is padding, of weight 0.
        """
        blocks = []
        for stage, rois in zip(box_head.stages, [*prediction.rois[1:], prediction.refined]):
            rows = relabel(sampled, rois, targets, stage.positive_iou)
            blocks.append(rows._replace(weight=rows.weight * (rows.labels > 0)).emptied())
        first = box_head.stages[0]
        most = len(targets.boxes) * int(first.batch_size_per_image * first.positive_fraction)
        if sampled.rois.device.type == "cpu":
            most = max(int(rows.weight.sum()) for rows in blocks)
        kept = [rows.weight.argsort(descending=True, stable=True)[:most] for rows in blocks]
        return SampledRoIs(*(torch.cat([t[k] for t, k in zip(of, kept)]) for of in zip(*blocks)))

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> HybridMaskPrediction:
        """Predictions for rois [T B, 5] of `interleaved`, by each head for its own B; norms learn from no padding."""
        predictions, skips = [], learns_statistics(self)
        for stage, (head, part) in enumerate(zip(self.stages, rois.tensor_split(len(self.stages)))):
            roi_features = head.extractor(features, part)
            pooled = roi_features.features
            real = torch.nonzero((part[:, 3:] > part[:, 1:3]).all(dim=1))[:, 0] if skips else None  # padding is empty
            *_, hidden = self.hidden(pooled if real is None else pooled[real], stage + 1)
            if real is not None:
                hidden = hidden.new_zeros(len(part), *hidden.shape[1:]).index_copy(0, real, hidden)
            predictions.append(MaskPrediction(hidden, roi_features))
        fields = zip(*(p.roi_features for p in predictions))
        joined: Any = (None if parts[0] is None else torch.cat(parts) for parts in fields)
        return HybridMaskPrediction(predictions, RoIFeatures(*joined))

    def hidden(self, features: Tensor, count: int) -> list[Tensor]:
        """What the first `count` heads make [R, C, h, w] of RoI features, each with what the one before has made."""
        found: list[Tensor] = []
        for stage, head in enumerate(self.stages[:count]):
            seen = features + self.flow[stage - 1](found[-1]).relu() if stage else features
            found.append(head.trunk(seen))
        return found

    def losses(self, prediction: HybridMaskPrediction, rows: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """loss_mask, summed over the heads with their weights."""
        size, terms = len(rows.rois) // len(self.stages), []
        for i, (head, weight, of_stage) in enumerate(zip(self.stages, self.stage_weights, prediction.stages)):
            own = SampledRoIs(*(t[i * size : (i + 1) * size] for t in rows))
            terms.append(weight * head.losses(of_stage, own, targets)["loss_mask"])
        return {"loss_mask": sum(terms[1:], terms[0])}

    def detect(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        """`detections` with the heads' mean masks [N, D, M, M], of the last head's RoI features."""
        labels = detections.labels[detections.valid]
        roi_features = self.stages[-1].extractor(features, rois_from_boxes(detections.boxes, detections.valid))
        masks = [
            head.logits(MaskPrediction(hidden, roi_features), labels).float().sigmoid()
            for head, hidden in zip(self.stages, self.hidden(roi_features.features, len(self.stages)))
        ]
        return with_masks(detections, torch.stack(masks).mean(dim=0))
