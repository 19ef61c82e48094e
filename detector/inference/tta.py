"""Test-time augmentation: the same images at several scales and mirrored, their detections merged.

Boxes of all views compete in one NMS. For those that are left, masks and keypoints are predicted in every view, in the
frame of the box: masks' probabilities and scores are averaged, and so are the logits of keypoints' heat maps, as in
Detectron (its HM_AVG); those of a mirrored view are mirrored back, left and right keypoints changing places. Extra
heads see the first view alone, which is not mirrored: nobody knows what a mirror makes of their fields.
Dimensions: N images, V views, D detections per image, R of them valid, P keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.model import TwoStageDetector, part_by_part
from detector.ops.boxes import clip, nms_by_image, survivors
from detector.structures import Batch, Detections, rois_from_boxes


class View(NamedTuple):
    scale: float
    flip: bool


class Augmented(nn.Module):
    """A detector that looks at every image several times.

    Args:
        model: with a box head, and with or without a mask and a keypoint head.
        scales: sizes of the views, as factors of the network's input.
        flip: each scale also mirrored left to right.
        mirrored: [P] which keypoint each one becomes in a mirror; needed for keypoints and `flip`. A data set that
            reads keypoints has it, by their names.

    Raises ValueError for a model without boxes, scales that are not positive, and `mirrored` of another length.
    """

    def __init__(
        self,
        model: TwoStageDetector,
        scales: Sequence[float] = (1.0,),
        flip: bool = True,
        mirrored: Sequence[int] | None = None,
    ):
        super().__init__()
        if model.box_head is None:
            raise ValueError("test-time augmentation merges boxes, and this model has no box head: proposals alone")
        if not scales or min(scales) <= 0:
            raise ValueError(f"scales={list(scales)}: expected at least one, all positive")
        if model.keypoint_head is not None and flip:
            count, given = model.keypoint_head.predictor.out_channels, list(mirrored or [])
            if sorted(given) != list(range(count)):
                raise ValueError(
                    f"mirrored={given}: expected which of the model's {count} keypoints each one becomes in a mirror; "
                    "the category of the annotations must name them, or leave flip=true away"
                )
        self.model, self.mirrored = model, mirrored
        self.views = [View(scale, turned) for scale in scales for turned in ([False, True] if flip else [False])]

    @property
    def extra_heads(self) -> nn.ModuleDict:
        """The model's."""
        return self.model.extra_heads

    def forward(self, batch: Batch) -> Detections:
        """Detections [N, D] in pixels of `batch.images`; those of an image are what it gets alone."""
        return part_by_part(self.detect, batch, batch.image_sizes)  # of one size, so are their views

    def detect(self, batch: Batch) -> Detections:
        """The same, of images of one size."""
        looks = []  # (batch, features) of each view
        found = []
        for view in self.views:
            seen = view_of(batch, view)
            features = self.model.features(seen)
            proposals, _ = self.model.rpn(features, seen)
            features = features[: self.model.neck.roi_levels]
            detections = self.model.box_head.detect(features, proposals, seen)
            found.append(detections._replace(boxes=from_view(detections.boxes, view, batch, seen)))
            looks.append((seen, features))
        merged, masks, extras, heatmaps = self.merge(found, batch), [], [], []
        for view, (seen, features) in zip(self.views, looks):
            there = merged._replace(boxes=to_view(merged.boxes, view, batch, seen))
            if self.model.mask_head is not None:
                seen_masks = self.model.mask_head.detect(features, there)
                masks.append(seen_masks.masks.flip(-1) if view.flip else seen_masks.masks)
                extras.append(seen_masks.extra or {})
            if self.model.keypoint_head is not None:
                heatmaps.append(self.heatmaps(features, there, view))
        if masks:
            extra = {name: torch.stack([own[name] for own in extras]).mean(dim=0) for name in extras[0]}
            merged = merged._replace(masks=torch.stack(masks).mean(dim=0), extra=extra)
        if heatmaps:
            merged = self.model.keypoint_head.decode(torch.stack(heatmaps).mean(dim=0), merged)
        (seen, features), *_ = looks
        there = merged._replace(boxes=to_view(merged.boxes, self.views[0], batch, seen))
        return merged._replace(extra=self.model.with_extra(features, there).extra)

    def heatmaps(self, features: Sequence[Tensor], there: Detections, view: View) -> Tensor:
        """Logits [R, P, H, H] of the keypoints in the boxes of a view, as they would be without the mirror."""
        rois = rois_from_boxes(there.boxes, there.valid)
        logits = self.model.keypoint_head(features, rois).keypoint_logits.float()
        return logits[:, self.mirrored].flip(-1) if view.flip else logits

    def merge(self, found: Sequence[Detections], batch: Batch) -> Detections:
        """The best of all views' detections, after NMS within each class."""
        head = self.model.box_head.stages[-1]
        fields = ("boxes", "scores", "labels", "valid")
        boxes, scores, labels, valid = (torch.cat([getattr(d, name) for d in found], 1) for name in fields)
        boxes = clip(boxes, batch.image_sizes)
        image = torch.arange(len(boxes), device=boxes.device)
        args = (image, labels, nms_by_image, head.nms_threshold, len(boxes), head.detections_per_image)
        left = survivors(boxes, scores, valid, *args)
        return Detections(left.of(boxes), left.scores, left.of(labels), left.valid)


def view_of(batch: Batch, view: View, multiple: int = 32) -> Batch:
    """The batch as a view sees it: every image's content resized, mirrored, and padded again."""
    images, sizes = batch.images, (batch.image_sizes * view.scale).round().long().clamp(min=1)
    if view == View(1.0, False):
        return batch
    height, width = (-(-int(side) // multiple) * multiple for side in sizes.amax(0))
    canvas = images.new_zeros(*images.shape[:2], height, width)
    for image, out, (h, w), (new_h, new_w) in zip(images, canvas, batch.image_sizes.tolist(), sizes.tolist()):
        content = image[None, :, :h, :w].float()
        if (new_h, new_w) != (h, w):
            content = F.interpolate(content, (new_h, new_w), mode="bilinear", antialias=True)
        out[:, :new_h, :new_w] = (content.flip(3) if view.flip else content)[0].round().clamp(0, 255).to(out.dtype)
    return batch._replace(images=canvas, image_sizes=sizes)


def to_view(boxes: Tensor, view: View, batch: Batch, seen: Batch) -> Tensor:
    """Boxes [N, D, 4] of the batch in the pixels of a view."""
    scale = (seen.image_sizes / batch.image_sizes).flip(1).repeat(1, 2).to(boxes)
    return mirror(boxes * scale[:, None], seen) if view.flip else boxes * scale[:, None]


def from_view(boxes: Tensor, view: View, batch: Batch, seen: Batch) -> Tensor:
    """Boxes [N, D, 4] of a view in the pixels of the batch."""
    scale = (batch.image_sizes / seen.image_sizes).flip(1).repeat(1, 2).to(boxes)
    return (mirror(boxes, seen) if view.flip else boxes) * scale[:, None]


def mirror(boxes: Tensor, batch: Batch) -> Tensor:
    """Boxes [N, D, 4] in their images mirrored left to right."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    width = batch.image_sizes[:, 1, None].to(boxes)
    return torch.stack([width - x2, y1, width - x1, y2], dim=-1)
