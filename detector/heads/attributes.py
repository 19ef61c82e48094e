"""Attributes of objects, what they are beside their class: RoI features -> trunk -> a logit for each of them.

An attribute that is there or not has a logit of its own and binary cross-entropy, one of words that exclude each other
a logit for each word and softmax cross-entropy. What is unknown of an object has no loss.
Dimensions: R RoIs, A attributes, L logits, N images, D detections per image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.heads.box import SampledRoIs
from detector.heads.trunk import FCTrunk
from detector.ops import losses
from detector.protocols import Trunk
from detector.roi import RoIExtractor, RoIOp, make_op
from detector.structures import Detections, RoIFeatures, Targets, rois_from_boxes


class AttributePrediction(NamedTuple):
    logits: Tensor  # [R, L]
    roi_features: RoIFeatures


class AttributeHead(nn.Module):
    """Attributes of RoIs.

    Args:
        in_channels, strides, num_classes: of the features and the data set, given by the model; attributes do not
            depend on the class.
        roi: factory of a RoI method, `roi(output_size)` or `roi(output_size, channels=...)`.
        attributes: A of them, [name] of one that is there or not, [name, word, word, ...] of one of several words. A
            training puts the data set's in its place where it is None.
        output_size: bins of a RoI, k or (h, w).
        trunk: factory `trunk(in_channels, output_size)` of a module with `out_channels`, from RoI features to [R, C].
        level_rule, canonical_level, canonical_size: FPN level assignment, see RoIExtractor.
        loss_weight: factor of the loss.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        roi: Callable[..., RoIOp],
        attributes: Sequence[Sequence[str]] | None = None,
        output_size: int | Sequence[int] = 7,
        trunk: Callable[..., Trunk] = FCTrunk,
        level_rule: str = "detectron2",
        canonical_level: int = 4,
        canonical_size: int = 224,
        loss_weight: float = 1.0,
    ):
        super().__init__()
        self.groups = [list(group) for group in attributes or ()]
        names = [group[0] for group in self.groups if group]
        if len(set(names)) < len(self.groups) or any(len(set(g[1:])) == 1 or len(set(g)) < len(g) for g in self.groups):
            raise ValueError(
                f"attributes={self.groups}: expected [name] or [name, word, word, ...], names and words that each "
                "occur once"
            )
        if not loss_weight > 0:
            raise ValueError(f"loss_weight={loss_weight}: must be positive")
        op = make_op(roi, output_size, channels=in_channels, levels=len(strides))
        self.extractor = RoIExtractor(op, strides, level_rule, canonical_level, canonical_size)
        self.trunk = trunk(op.output_channels(in_channels), op.output_size)
        sizes = [max(len(words), 1) for _, *words in self.groups]
        ends = np.cumsum([0, *sizes]).tolist()
        self.columns = [slice(start, end) for start, end in pairwise(ends)]  # of the logits, for each attribute
        self.predictor = nn.Linear(self.trunk.out_channels, ends[-1])
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)
        self.loss_weight = loss_weight

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> AttributePrediction:
        """Logits for rois [R, 5] = (batch_index, x1, y1, x2, y2)."""
        roi_features = self.extractor(features, rois)
        return AttributePrediction(self.predictor(self.trunk(roi_features.features)), roi_features)

    def losses(self, prediction: AttributePrediction, positives: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """loss_attributes: the mean over all that is known of the matched objects."""
        codes, logits = positives.of_targets(targets.attributes), prediction.logits.float()
        weight = positives.weight[:, None] * (codes >= 0)
        terms = [logits.sum() * 0]  # so that there is one, whatever the attributes
        for group, columns, code, own in zip(self.groups, self.columns, codes.clamp(min=0).T, weight.T):
            if len(group) == 1:
                loss = F.binary_cross_entropy_with_logits(logits[:, columns.start], code.float(), reduction="none")
            else:
                loss = F.cross_entropy(logits[:, columns], code, reduction="none")
            terms.append((loss * own).sum())
        count = losses.global_mean_count(weight.sum())
        return {"loss_attributes": self.loss_weight * torch.stack(terms).sum() / count}

    def detect(self, features: Sequence[Tensor], detections: Detections) -> dict[str, Tensor]:
        """attributes [N, D, L]: probabilities, of words that exclude each other with a sum of 1."""
        logits = self(features, rois_from_boxes(detections.boxes, detections.valid)).logits.float()
        parts = [
            logits[:, columns].sigmoid() if len(group) == 1 else logits[:, columns].softmax(dim=1)
            for group, columns in zip(self.groups, self.columns)
        ]
        found = logits.new_zeros(*detections.valid.shape, logits.shape[1])
        found[detections.valid] = torch.cat(parts, dim=1) if parts else logits
        return {"attributes": found}

    @property
    def writers(self) -> Mapping[str, Callable[[np.ndarray], Any]]:
        """{"occluded": 0.93, "color": {"blue": 0.1, "red": 0.9}}."""
        return {"attributes": self.written}

    def written(self, values: np.ndarray) -> dict[str, Any]:
        """The probabilities [L] of a detection by name."""
        numbers = [round(value, 4) for value in values.tolist()]
        return {
            name: dict(zip(words, numbers[columns])) if words else numbers[columns.start]
            for (name, *words), columns in zip(self.groups, self.columns)
        }
