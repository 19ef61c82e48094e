"""PointRend (Kirillov et al. 2020): a coarse mask of the whole RoI, made fine at the points where it is unsure.

A point's logits come from the features of the finest level at the very place and from the coarse mask there, by layers
that all points share. In training the points are those of the coarse mask's least certain among many drawn at random,
and some at random (section 3.1); in inference the mask is doubled again and again, and its least certain cells are made
anew each time (figure 4).
Dimensions: R RoIs, P points of each, K classes, C channels, M side of a mask. Points are (x, y), 0 to 1 in their RoI.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.heads.box import SampledRoIs
from detector.heads.mask import mask_targets, with_masks
from detector.ops import losses
from detector.ops.checks import check_counts, check_fractions
from detector.ops.layers import init_kaiming, init_uniform, init_zero, module_list
from detector.roi import RoIExtractor, RoIOp, make_op
from detector.roi.bag import pool_cells
from detector.roi.geometry import Axis, bilinear, locate
from detector.structures import Detections, RoIFeatures, Targets, rois_from_boxes


class CoarseMask(nn.Module):
    """A convolution that halves the resolution, fully connected layers, a logit for each cell of each class."""

    def __init__(self, in_channels: int, output_size: tuple[int, int], num_classes: int, fc_channels: Sequence[int]):
        super().__init__()
        self.size = output_size[0] // 2, output_size[1] // 2
        cells = self.size[0] * self.size[1]
        self.downsample = nn.Conv2d(in_channels, in_channels, 2, stride=2)
        widths = [in_channels * cells, *fc_channels]
        self.fc = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        self.mask_logits = nn.Linear(widths[-1], num_classes * cells)
        init_kaiming(self.downsample)
        init_uniform(self.fc)
        nn.init.normal_(self.mask_logits.weight, std=0.001)
        nn.init.zeros_(self.mask_logits.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [R, K, h / 2, w / 2] of RoI features [R, C, h, w]."""
        hidden = self.downsample(features).relu_().flatten(1)
        for layer in self.fc:
            hidden = layer(hidden).relu_()
        return self.mask_logits(hidden).unflatten(1, (-1, *self.size))


class PointMLP(nn.Module):
    """Layers shared by all points; each sees the coarse logits anew."""

    def __init__(self, in_channels: int, num_classes: int, channels: Sequence[int]):
        super().__init__()
        widths = [in_channels, *channels]
        self.fc = module_list(nn.Conv1d(a + num_classes, b, 1) for a, b in zip(widths, widths[1:]))
        self.mask_logits = nn.Conv1d(widths[-1] + num_classes, num_classes, 1)
        for layer in (*self.fc, self.mask_logits):
            init_zero(layer)
        for layer in self.fc:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.mask_logits.weight, std=0.001)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Logits [R, K, P] of fine features [R, C, P] and coarse logits [R, K, P]."""
        hidden = fine
        for layer in self.fc:
            hidden = layer(torch.cat([hidden, coarse], dim=1)).relu()
        return self.mask_logits(torch.cat([hidden, coarse], dim=1))


class PointPrediction(NamedTuple):
    coarse: Tensor  # [R, K, h, w] logits
    finest: Tensor  # [N, C, H, W], the level that points read
    rois: Tensor  # [R, 5]
    roi_features: RoIFeatures


class PointRendHead(nn.Module):
    """Masks of RoIs, fine where they are unsure.

    Args:
        in_channels, strides, num_classes: of the features and the data set, given by the model.
        roi: factory of a RoI method, `roi(output_size)` or `roi(output_size, channels=...)`, on the finest level alone.
        output_size: bins of a RoI, k or (h, w), even; the coarse mask has half as many.
        fc_channels: widths of the coarse mask's fully connected layers.
        point_channels: widths of the points' layers.
        points, oversample, importance: of a RoI in training; how many times more are drawn; the share of the points
            that are the least certain of these, the others are drawn at random.
        subdivisions, subdivision_points: how often the mask is doubled in inference, and how many of its cells are made
            anew each time.
        target_threshold: of the coarse mask's targets, see MaskHead; those of points are the object's mask there.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        roi: Callable[..., RoIOp],
        output_size: int | Sequence[int] = 14,
        fc_channels: Sequence[int] = (1024, 1024),
        point_channels: Sequence[int] = (256, 256, 256),
        points: int = 196,
        oversample: float = 3.0,
        importance: float = 0.75,
        subdivisions: int = 5,
        subdivision_points: int = 784,
        target_threshold: float | None = 0.5,
    ):
        super().__init__()
        check_counts(points=points, subdivisions=subdivisions, subdivision_points=subdivision_points)
        check_fractions(importance=importance)
        if oversample < 1:
            raise ValueError(f"oversample={oversample}: must be at least 1")
        op = make_op(roi, output_size, channels=in_channels, levels=1)
        if any(side % 2 for side in op.output_size):
            raise ValueError(f"output_size={output_size}: must be even, the coarse mask has half as many cells")
        self.extractor = RoIExtractor(op, strides[:1])
        self.coarse = CoarseMask(op.output_channels(in_channels), op.output_size, num_classes, fc_channels)
        self.points = PointMLP(in_channels, num_classes, point_channels)
        self.num_points, self.oversample, self.importance = points, oversample, importance
        self.subdivisions, self.subdivision_points = subdivisions, subdivision_points
        self.target_threshold = target_threshold

    @property
    def stages(self) -> tuple[PointRendHead, ...]:
        """As MaskHead has them."""
        return (self,)

    def forward(self, features: Sequence[Tensor], rois: Tensor) -> PointPrediction:
        """The coarse masks of rois [R, 5] = (batch_index, x1, y1, x2, y2), and what points need."""
        roi_features = self.extractor(features[:1], rois)
        return PointPrediction(self.coarse(roi_features.features), features[0], rois, roi_features)

    def losses(self, prediction: PointPrediction, positives: SampledRoIs, targets: Targets) -> dict[str, Tensor]:
        """loss_mask of the coarse masks and loss_point; objects without a mask do not count."""
        weight = positives.weight * positives.of_targets(targets.has_mask)
        count = losses.global_mean_count(weight.sum())
        coarse = of_class(prediction.coarse, positives.labels)
        wanted = mask_targets(positives, targets, coarse.shape[1:], self.target_threshold)
        points = self.uncertain_points(coarse.detach())
        logits = of_class(self.at(points, prediction), positives.labels)
        there = self.point_targets(points, positives, targets)
        return {
            "loss_mask": losses.mask(coarse, wanted, weight, count),
            "loss_point": losses.mask(logits[:, None], there[:, None], weight, count),
        }

    def at(self, points: Tensor, prediction: PointPrediction) -> Tensor:
        """Logits [R, K, P] at points [R, P, 2]."""
        fine = read_map(prediction.finest, self.extractor.strides[0], prediction.rois, points)
        return self.points(fine, read_grid(prediction.coarse, points).to(fine.dtype))

    @torch.no_grad()
    def uncertain_points(self, coarse: Tensor) -> Tensor:
        """Points [R, P, 2] to learn from, of coarse logits [R, h, w]."""
        drawn = torch.rand(len(coarse), int(self.num_points * self.oversample), 2, device=coarse.device)
        unsure = -read_grid(coarse[:, None], drawn)[:, 0].abs()
        kept = unsure.topk(int(self.importance * self.num_points), dim=1).indices
        random = torch.rand(len(coarse), self.num_points - kept.shape[1], 2, device=coarse.device)
        return torch.cat([drawn.gather(1, kept[..., None].expand(-1, -1, 2)), random], dim=1)

    @torch.no_grad()
    def point_targets(self, points: Tensor, positives: SampledRoIs, targets: Targets) -> Tensor:
        """The matched object's mask [R, P], 0 to 1, at points [R, P, 2]."""
        masks, windows = positives.of_targets(targets.masks), positives.of_targets(targets.mask_windows)
        corner, size = positives.rois[:, None, 1:3], positives.rois[:, None, 3:] - positives.rois[:, None, 1:3]
        sides = (windows[:, None, 2:] - windows[:, None, :2]).clamp(min=1e-6)
        return read_grid(masks[:, None].float(), (corner + points * size - windows[:, None, :2]) / sides)[:, 0]

    def refined(self, prediction: PointPrediction, labels: Tensor) -> Tensor:
        """Logits [R, M, M] of the classes labels [R]."""
        logits = of_class(prediction.coarse, labels)
        for step in range(self.subdivisions):
            logits = F.interpolate(logits[:, None], scale_factor=2.0, mode="bilinear", align_corners=False)[:, 0]
            height, width = logits.shape[1:]
            if 4 * height * width <= self.subdivision_points and step < self.subdivisions - 1:
                continue  # all cells of the next one will be made anew
            flat = logits.flatten(1)
            cells = (-flat.abs()).topk(min(self.subdivision_points, height * width), dim=1).indices
            points = torch.stack([(cells % width + 0.5) / width, (cells // width + 0.5) / height], dim=2)
            anew = of_class(self.at(points, prediction), labels)
            logits = flat.scatter(1, cells, anew.to(flat.dtype)).view_as(logits)
        return logits

    def detect(self, features: Sequence[Tensor], detections: Detections) -> Detections:
        """`detections` with masks [N, D, M, M]: probabilities of each detection's label in its box's frame."""
        rois, labels = rois_from_boxes(detections.boxes, detections.valid), detections.labels[detections.valid]
        # a few at a time: what all points of all RoIs read would be large
        parts = zip(rois.split(32), labels.split(32))
        logits = torch.cat([self.refined(self(features, part), of) for part, of in parts])
        return with_masks(detections, logits.float().sigmoid())


def of_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Those [R, ...] of logits [R, K, ...] for the classes labels [R], from 1 on; 0 stands for any."""
    return logits[torch.arange(len(labels), device=labels.device), (labels - 1).clamp(min=0)]


def read_grid(grid: Tensor, points: Tensor) -> Tensor:
    """Values [R, C, P] of grids [R, C, h, w], each over its RoI, at points [R, P, 2]; 0 beyond its outermost cells."""
    return F.grid_sample(grid.float(), 2 * points[:, None] - 1, align_corners=False)[:, :, 0]


def read_map(features: Tensor, stride: float, rois: Tensor, points: Tensor) -> Tensor:
    """Values [R, C, P] of maps [N, C, H, W] at points [R, P, 2] of rois [R, 5]."""
    regions = locate([features], rois, torch.zeros(len(rois), dtype=torch.int64, device=rois.device), [stride])
    corner, size = regions.boxes[:, None, :2], regions.boxes[:, None, 2:] - regions.boxes[:, None, :2]
    x, y = (corner + points.to(corner) * size - 0.5).unbind(2)  # [R, P] in cells
    rows, columns = bilinear(y, regions.heights[:, None]), bilinear(x, regions.widths[:, None])
    axes = (Axis(*(t[:, :, None, None] for t in axis)) for axis in (rows, columns))  # [R, P, 1, 1, 2]
    return pool_cells([features], regions, *axes)[..., 0]
