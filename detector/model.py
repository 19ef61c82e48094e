"""The two-stage detector: Faster R-CNN (Ren et al. 2015), Mask R-CNN (He et al. 2017), with FPN (Lin et al. 2017).

    images -> normalise -> backbone -> neck: features, a list over levels of [N, C, Hl, Wl]
           -> RPN: proposals [N, P] -> heads over RoIs [R, 5] = (batch_index, x1, y1, x2, y2)
           -> training: losses; inference: detections [N, D]

Dimensions: N images, P proposals, R RoIs, D detections, C channels, K classes, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detector.heads.box import SampledRoIs
from detector.heads.trunk import SharedTrunk
from detector.ops import losses
from detector.ops.boxes import area
from detector.ops.layers import learns_statistics
from detector.protocols import Backbone, BoxHead, DetectionHead, ExtraHead, Neck
from detector.rpn import RPN
from detector.structures import RESULT_FIELDS, Batch, Detections, RoIFeatures, Targets, each

Output = Detections | dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Tensor]]
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def joined(
    found: Mapping[str, Tensor], more: Mapping[str, Tensor], head: str, taken: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Both together. Raises ValueError where `head` gives `more` by a name that is taken."""
    if twice := [name for name in more if name in found or name in taken]:
        raise ValueError(f"{head}: {', '.join(twice)}: another part of the model has this name; choose one of its own")
    return {**found, **more}


def parts(canvases: Tensor, alone: bool) -> list[Tensor]:
    """Rows of equal canvas [N, 2], part by part; or each row alone."""
    if alone:
        return list(torch.arange(len(canvases), device=canvases.device).split(1))
    group = canvases.unique(dim=0, return_inverse=True)[1]
    return [torch.nonzero(group == g)[:, 0] for g in group.unique()]


def part_by_part(detect: Callable[[Batch], Detections], batch: Batch, canvases: Tensor) -> Detections:
    """What `detect` makes of each image [N], whatever the others: only those of equal canvas [N, 2] go together.

    On the CPU every image goes alone: the libraries choose their kernels by the size of the batch, so that the last
    bits would depend on it, and larger batches are no faster there.
    """
    rows = parts(canvases, alone=batch.images.device.type == "cpu")
    found = [detect(Batch(*(t[part] for t in batch))) for part in rows]
    back = torch.cat(rows).argsort()
    return each(lambda *of_parts: torch.cat(of_parts)[back], *found)


class TwoStageDetector(nn.Module):
    """A backbone, a neck, a region proposal network and heads over its proposals.

    Args:
        num_classes: K, without the background.
        backbone: module with `out_channels` and `strides`, one entry per map that it returns.
        neck: factory `neck(in_channels, strides)` of a module with `out_channels`, `strides` and `roi_levels`.
        rpn: factory `rpn(in_channels, strides)`.
        box_head: factory `box_head(in_channels, strides, num_classes)`, or None for proposals only.
        mask_head: factory like box_head's, or None.
        keypoint_head: factory like box_head's, or None.
        offset_loss_weight: factor of the L2 loss on learned offsets ("lambda").
        pixel_mean, pixel_std: of each channel, in 0..255, in the order of `channel_order`.
        channel_order: 'rgb' or 'bgr', what the backbone's weights expect. Images of three channels always come in as
            RGB, others as 'rgb' leaves them.
        share_trunk: the mask head works on what the box head's ResNetTrunk gives before its mean (C4).
        channels_last: give the images to the backbone in this layout, in which most layers are fastest.
        size_divisibility: padding beyond the next multiple of it is cut off again before the backbone; None keeps all
            in training.
        pad_multiple: in inference, where size_divisibility is None, an image is padded to the next multiple of it.
        extra_heads: factories like box_head's of further heads by name, see protocols.ExtraHead.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        num_classes: int,
        backbone: Backbone,
        neck: Callable[..., Neck],
        rpn: Callable[..., RPN],
        box_head: Callable[..., BoxHead] | None = None,
        mask_head: Callable[..., DetectionHead] | None = None,
        keypoint_head: Callable[..., DetectionHead] | None = None,
        offset_loss_weight: float = 0.1,
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        channel_order: str = "rgb",
        share_trunk: bool = False,
        channels_last: bool = True,
        size_divisibility: int | None = None,
        pad_multiple: int = 32,
        extra_heads: Mapping[str, Callable[..., ExtraHead]] | None = None,
    ):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: a detector needs at least one foreground class")
        if channel_order not in ("rgb", "bgr"):
            raise ValueError(f"channel_order={channel_order!r}: expected 'rgb' or 'bgr'")
        channels = getattr(backbone, "in_channels", 3)
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) != channels:
                raise ValueError(
                    f"{name}={list(values)}: expected a number for each of the {channels} channels that the backbone "
                    "takes; `detector validate` measures them and prints the settings to give"
                )
        if min(pixel_std) <= 0:
            raise ValueError(f"pixel_std={list(pixel_std)}: expected positive numbers")
        if channel_order == "bgr" and channels != 3:
            raise ValueError(f"channel_order='bgr': {channels} channels have no such order; expected 'rgb'")
        if box_head is None and (mask_head or keypoint_head or extra_heads):
            raise ValueError(
                "mask_head, keypoint_head or extra_heads without box_head: they work on the box head's detections"
            )
        for name in extra_heads or {}:
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"extra_heads.{name}: cannot be a name; choose another word of letters and digits")
        self.num_classes, self.channel_order = num_classes, channel_order
        self.offset_loss_weight = offset_loss_weight
        self.size_divisibility, self.pad_multiple = size_divisibility, pad_multiple
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(channels, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(channels, 1, 1), persistent=False)

        self.backbone = backbone
        self.neck = neck(backbone.out_channels, backbone.strides)
        self.rpn = rpn(self.neck.out_channels, self.neck.strides)
        roi_args = self.neck.out_channels, self.neck.strides[: self.neck.roi_levels], num_classes
        self.box_head = box_head and box_head(*roi_args)
        shared = {"trunk": partial(SharedTrunk, head=self.box_head)} if share_trunk else {}
        self.mask_head = mask_head and mask_head(*roi_args, **shared)
        stages = [len(head.stages) for head in (self.mask_head, self.box_head) if head is not None]
        if hasattr(self.mask_head, "interleaved") and stages[0] != stages[1]:
            raise ValueError(
                f"mask_head has {stages[0]} stages and box_head {stages[1]}: expected as many, as in model=htc"
            )
        self.keypoint_head = keypoint_head and keypoint_head(*roi_args)
        made: dict[str, Any] = {name: head(*roi_args) for name, head in (extra_heads or {}).items()}
        self.extra_heads: Any = nn.ModuleDict(made)  # of ExtraHeads, which mypy does not take for modules

    def forward(self, batch: Batch, targets: Targets | None = None, stats: bool = False) -> Output:
        """Losses in training, detections in inference.

        Args:
            batch: images uint8 [N, C, H, W], H and W multiples of the coarsest stride.
            targets: needed in training.
            stats: return (losses, dict of tensors worth a look) instead of losses.

        Returns:
            Training: dict of scalar losses with the same keys for every batch. Inference: Detections [N, D], boxes in
            pixels of `batch.images`; those of an image are what it gets alone.
        """
        if not self.training:
            return part_by_part(
                lambda part: self.detect(self.features(part), part), batch, self.canvases(batch.image_sizes)
            )
        if targets is None:
            raise ValueError("targets are needed in training mode; call model.eval() for detections")
        features = self.features(batch)
        proposals, found = self.rpn(features, batch, targets)
        features = features[: self.neck.roi_levels]
        if self.box_head is None:
            return (found, {}) if stats else found

        sampled, positives = self.box_head.sample(proposals, batch, targets)
        if self.normalises_over_rows():
            sampled, positives = sampled.without_padding(), positives.without_padding()
        heads: dict[str, tuple[Any, SampledRoIs]] = {"box_head": (self.box_head, sampled)}
        for name in ("mask_head", "keypoint_head"):
            if getattr(self, name) is not None:
                heads[name] = (getattr(self, name), positives)
        for name, head in self.extra_heads.items():
            heads[f"extra_heads.{name}"] = (head, sampled if getattr(head, "negatives", False) else positives)
        predictions: dict[str, Any] = {}
        roi_features: dict[str, tuple[RoIFeatures, SampledRoIs]] = {}
        for name, (head, rows) in heads.items():
            if hasattr(head, "interleaved"):  # it learns on what the box head has refined
                rows = head.interleaved(self.box_head, predictions["box_head"], sampled, targets)
            prediction = predictions[name] = head(features, rows.rois)
            found = joined(found, head.losses(prediction, rows, targets), name)
            if prediction.roi_features is not None:
                roi_features[name] = prediction.roi_features, rows
        found |= self.offset_loss(roi_features)
        return (found, self.stats(roi_features, positives)) if stats else found

    def normalises_over_rows(self) -> bool:
        """Whether heads have batch norms that learn, in whose statistics rows of padding would count."""
        heads = [self.box_head, self.mask_head, self.keypoint_head, *self.extra_heads.values()]
        return any(learns_statistics(head) for head in heads if head is not None)

    def features(self, batch: Batch) -> list[Tensor]:
        """Feature levels [N, C, Hl, Wl] of a batch, finest first."""
        images = self.normalise(batch).contiguous(memory_format=self.layout)
        return self.neck(self.backbone(images))

    @property
    def divisor(self) -> int:
        """In inference an image's sides are padded to the next multiple of it."""
        return self.size_divisibility or self.pad_multiple

    def canvases(self, image_sizes: Tensor) -> Tensor:
        """(height, width) [N, 2] that images of image_sizes [N, 2] are padded to, each by itself."""
        return (image_sizes + self.divisor - 1) // self.divisor * self.divisor

    def normalise(self, batch: Batch) -> Tensor:
        """uint8 images [N, C, H, W] as the network's float input, zero outside each image's content.

        In inference what lies beyond the canvas of the largest image is cut off. Zeros there would not be nothing:
        norms and biases fill them, and convolutions take that back into the content.
        """
        images = batch.images if self.channel_order == "rgb" else batch.images.flip(1)
        if not self.training or self.size_divisibility is not None:
            cells = ((batch.image_sizes.amax(0) + self.divisor - 1) // self.divisor).tolist()
            height, width = (cell * self.divisor for cell in cells)
            if torch.compiler.is_exporting():  # the program cuts too, and refuses images larger than their canvas
                for cell, side, limit in zip(cells, (height, width), images.shape[2:]):
                    torch._check(cell >= 1)
                    torch._check(side <= limit)
            images = images[:, :, :height, :width]
        height, width = batch.image_sizes[:, :, None].unbind(1)
        rows = torch.arange(images.shape[2], device=images.device) < height
        columns = torch.arange(images.shape[3], device=images.device) < width
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return (images.float() - self.pixel_mean) / self.pixel_std * inside

    def detect(self, features: Sequence[Tensor], batch: Batch) -> Detections:
        """Detections [N, D] from features; without a box head the proposals, all of label 1."""
        proposals, _ = self.rpn(features, batch)
        if self.box_head is None:
            return Detections(proposals.boxes, proposals.scores, proposals.valid.long(), proposals.valid)
        features = features[: self.neck.roi_levels]
        detections = self.box_head.detect(features, proposals, batch)
        for head in (self.mask_head, self.keypoint_head):
            detections = detections if head is None else head.detect(features, detections)
        return self.with_extra(features, detections)

    def with_extra(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        """The detections [N, D] with the fields of the extra heads."""
        extra = dict(detections.extra or {})
        for name, head in self.extra_heads.items():
            fields = head.detect(features, detections)
            for field, values in fields.items():
                if values.shape[:2] != detections.valid.shape:
                    wanted = list(detections.valid.shape)
                    raise ValueError(f"extra_heads.{name}: {field} is {list(values.shape)}, expected {wanted} and more")
            extra = joined(extra, fields, f"extra_heads.{name}", RESULT_FIELDS)
        return detections._replace(extra=extra or None)

    def offset_loss(self, roi_features: dict[str, tuple[RoIFeatures, SampledRoIs]]) -> dict[str, Tensor]:
        """The weighted L2 loss on the offsets that the heads' RoI methods predicted, if any of them predicts some."""
        terms = [
            losses.offset_l2(roi.offsets, rows.weight, losses.global_mean_count(rows.weight.sum()))
            for roi, rows in roi_features.values()
            if roi.offsets is not None
        ]
        return {"loss_offset": self.offset_loss_weight * sum(terms[1:], terms[0])} if terms else {}

    @staticmethod
    def stats(roi_features: dict[str, tuple[RoIFeatures, SampledRoIs]], positives: SampledRoIs) -> dict[str, Tensor]:
        """Offsets, modulation and the sizes (sqrt of the area, px) of the RoIs per head, positive RoIs: for logging."""
        found = {"positives": positives.weight.sum()}
        for name, (roi, rows) in roi_features.items():
            for field in ("offsets", "modulation"):
                if getattr(roi, field) is not None:
                    found[f"{name}/{field}"] = getattr(roi, field).detach()[rows.weight > 0]
            found[f"{name}/roi_sizes"] = area(rows.rois[rows.weight > 0, 1:]).sqrt()
        return found
