"""The keypoint branch (Mask R-CNN, He et al. 2017, section 5): a heat map over the RoI's cells for each keypoint.

Dimensions: N images, G ground-truth objects, R RoIs, P keypoints, H side of a heat map, D detections per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.heads.box import SampledRoIs
from detector.heads.trunk import ConvTrunk
from detector.ops import losses
from detector.ops.checks import check_choice
from detector.ops.layers import init_kaiming
from detector.protocols import Trunk
from detector.roi import RoIExtractor, RoIOp, make_op
from detector.structures import Detections, RoIFeatures, Targets, rois_from_boxes

KEYPOINT_TRUNK = partial(ConvTrunk, conv_channels=(512,) * 8)


class KeypointPrediction(NamedTuple):
    keypoint_logits: Tensor  # [R, P, H, H]
    roi_features: RoIFeatures


class KeypointHead(nn.Module):
    """Keypoints of RoIs.

    Args:
        in_channels, strides, num_classes: of the features and the data set, given by the model; keypoints do not depend
            on the class.
        roi: factory of a RoI method, `roi(output_size)` or `roi(output_size, channels=...)`.
        num_keypoints: P; None: COCO's 17. A training puts the data set's number in its place.
        output_size: bins of a RoI; the heat map has four times as many on each side.
        trunk: factory `trunk(in_channels, output_size)` of a module with `out_channels` that keeps the resolution.
        level_rule, canonical_level, canonical_size: FPN level assignment, see RoIExtractor.
        score: of a keypoint at inference: the 'logit' at its cell (torchvision), or the 'probability' (detectron2).
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        roi: Callable[..., RoIOp],
        num_keypoints: int | None = None,
        output_size: int | Sequence[int] = 14,
        trunk: Callable[..., Trunk] = KEYPOINT_TRUNK,
        level_rule: str = "detectron2",
        canonical_level: int = 4,
        canonical_size: int = 224,
        score: str = "probability",
    ):
        super().__init__()
        check_choice("score", score, ("logit", "probability"))
        op = make_op(roi, output_size, channels=in_channels, levels=len(strides))
        self.extractor = RoIExtractor(op, strides, level_rule, canonical_level, canonical_size)
        self.trunk = trunk(op.output_channels(in_channels), op.output_size)
        self.predictor = nn.ConvTranspose2d(self.trunk.out_channels, num_keypoints or 17, 4, stride=2, padding=1)
        init_kaiming(self.predictor)
        self.score = score

    @property
    def stages(self) -> tuple[KeypointHead, ...]:
        """As the other heads have them; of keypoints there is but one."""
        return (self,)

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> KeypointPrediction:
        """Logits for rois [R, 5] = (batch_index, x1, y1, x2, y2)."""
        roi_features = self.extractor(features, rois)
        logits = self.predictor(self.trunk(roi_features.features))
        return KeypointPrediction(F.interpolate(logits, scale_factor=2.0, mode="bilinear"), roi_features)

    def losses(self, prediction: KeypointPrediction, positives: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """loss_keypoint: cross-entropy over the cells, mean over the labelled keypoints that lie inside their RoI."""
        logits = prediction.keypoint_logits
        cell, inside = to_cells(positives.of_targets(targets.keypoints), positives.rois[:, 1:], logits.shape[-2:])
        weight = inside * positives.weight[:, None]
        loss = F.cross_entropy(logits.float().flatten(2).flatten(0, 1), cell.flatten(), reduction="none")
        return {"loss_keypoint": (loss * weight.flatten()).sum() / losses.global_mean_count(weight.sum())}

    def detect(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        """`detections` with keypoints [N, D, P, 3] = (x, y, score)."""
        return self.decode(
            self(features, rois_from_boxes(detections.boxes, detections.valid)).keypoint_logits, detections
        )

    def decode(self, logits: Tensor, detections: Detections) -> Detections:
        """`detections` with the keypoints of logits [R, P, H, H], one row for each valid box."""
        logits = logits.float()
        keypoints = logits.new_zeros(*detections.valid.shape, logits.shape[1], 3)
        if len(logits):
            keypoints[detections.valid] = from_heatmaps(logits, detections.boxes[detections.valid], self.score)
        return detections._replace(keypoints=keypoints)


def to_cells(keypoints: Tensor, boxes: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The cell of a heat map, counted row by row, that each keypoint falls into, and whether it is labelled and inside.

    Args:
        keypoints: [R, P, 3] = (x, y, visibility). boxes: [R, 4]. size: (h, w) of the heat map.

    A point on the right or lower border belongs to the last cell.
    """
    start, end = boxes[:, None, :2], boxes[:, None, 2:]
    cells = boxes.new_tensor([size[1], size[0]])
    place = (keypoints[..., :2] - start) * cells / (end - start).clamp(min=1e-6)
    place = torch.where(keypoints[..., :2] == end, cells - 1, place.floor())
    inside = ((place >= 0) & (place < cells)).all(-1) & (keypoints[..., 2] > 0)
    x, y = torch.where(inside[..., None], place, 0.0).long().unbind(-1)
    return y * size[1] + x, inside.float()


def from_heatmaps(logits: Tensor, boxes: Tensor, score: str) -> Tensor:
    """Keypoints [R, P, 3] = (x, y, score): the highest point of each heat map resized to its box.

    Args:
        logits: [R, P, H, W]. boxes: [R, 4]. score: 'logit' or 'probability'.

    The maps are resized bicubically to whole pixels, and the winner's centre counts. Probabilities are normalised over
    the map as it was predicted, so that those of small and large boxes can be compared.
    """
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    whole = sizes.ceil().long()
    winners = []
    for heatmap, (width, height) in zip(logits, whole.tolist()):
        resized = F.interpolate(heatmap[None], size=(height, width), mode="bicubic", align_corners=False)[0]
        winners.append(resized.flatten(1).max(dim=1))
    best, place = (torch.stack(values) for values in zip(*winners))  # [R, P]
    sizes, whole = sizes[:, None], whole[:, None]
    cells = torch.stack([place % whole[..., 0], place // whole[..., 0]], dim=2)
    points = boxes[:, None, :2] + (cells + 0.5) * sizes / whole
    if score == "probability":
        best = 1 / (logits.flatten(2) - best[..., None]).exp().sum(dim=2)  # of large logits exacter than logsumexp
    return torch.cat([points, best[..., None]], dim=2)
