"""Deformable RoI pooling ('Deformable convolutional networks', Dai et al. 2017, section 2.2, equations 5 and 6) and its
modulated form ('Deformable ConvNets v2', Zhu et al. 2019, section 3.2, equation 2).

    out[i, j] = m_ij * mean over the points p of bin (i, j) of f(p + gamma * (width * dx_ij, height * dy_ij))

The offsets (dx, dy) are predicted, relative to the RoI's size, by a small fully connected network from the features
that a plain RoI method pooled before; m is 1, or predicted the same way, in (0, 1).
Dimensions: R RoIs, C channels, h x w bins, s points per bin and axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.ops.checks import check_choice
from detector.ops.layers import init_zero
from detector.roi.align import RoIAlign
from detector.roi.bag import pool_cells
from detector.roi.base import RoIOp, check_inputs, choose_path, exporting, make_op
from detector.roi.geometry import Axis, Regions, at_points, group_points, locate
from detector.roi.plain import align_boxes, as_maps, bins
from detector.structures import RoIFeatures


class OffsetPredictor(nn.Module):
    """Features [R, C, h, w] -> offsets (dx, dy) [R, 2, points_h, points_w] and modulation [R, points_h, points_w].

    Two stacks of fully connected layers; the last layer of each starts at zero, so the offsets start at 0 and the
    modulation at 1/2.
    """

    def __init__(
        self, inputs: int, points: tuple[int, int], width: int, depth: int, modulation_depth: int, modulated: bool
    ):
        super().__init__()
        self.points = points
        count = points[0] * points[1]
        self.offsets = fully_connected(inputs, width, depth, 2 * count)
        self.modulation = fully_connected(inputs, width, modulation_depth, count) if modulated else None

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor | None]:
        pooled = pooled.flatten(1)
        offsets = self.offsets(pooled).unflatten(1, (2, *self.points))
        if self.modulation is None:
            return offsets, None
        return offsets, self.modulation(pooled).sigmoid().unflatten(1, self.points)


def fully_connected(inputs: int, width: int, depth: int, outputs: int) -> nn.Sequential:
    """`depth` hidden layers with ReLU and a last layer that starts at zero."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU(inplace=True)]
        inputs = width
    last = nn.Linear(inputs, outputs)
    init_zero(last)
    return nn.Sequential(*layers, last)


class DeformableRoIPool(RoIOp):
    """Deformable RoI pooling, v1 or modulated (v2).

    Args:
        output_size: int or (h, w). channels: C of the feature maps.
        sampling_ratio: points per bin and axis; 0 is adaptive, as mmdetection's models are trained.
        gamma: scale of the offsets, times the RoI's width and height.
        modulated: whether every bin (or point) is also weighted by a predicted factor in (0, 1), which starts at 1/2.
        offset_granularity: "bin", one offset for all points of a bin, or "point", one for each (needs a fixed ratio).
        predictor: "shared" by all levels, or one "per_level" (then `levels` says how many).
        predictor_width, predictor_depth, modulation_depth: units per hidden layer and how many of these layers.
        base: factory of the method whose result feeds the predictor; RoI Align with the same settings if None.

    With zero offsets, hence at the start of training, the result is RoIAlign(aligned=True)'s, times 1/2 if modulated.
    RoIs of odd kinds behave as there. Gradients reach the features, the predictor and, if wanted, the boxes.
    Parameters live under `offset_predictor.{0 or level}`: `offsets` and `modulation`.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        sampling_ratio: int = 2,
        gamma: float = 0.1,
        modulated: bool = False,
        offset_granularity: str = "bin",
        predictor: str = "shared",
        levels: int = 4,
        predictor_width: int = 1024,
        predictor_depth: int = 2,
        modulation_depth: int = 1,
        base: Callable[..., RoIOp] | None = None,
    ):
        super().__init__(output_size)
        check_choice("offset_granularity", offset_granularity, ("bin", "point"))
        check_choice("predictor", predictor, ("shared", "per_level"))
        if offset_granularity == "point" and sampling_ratio == 0:
            raise ValueError("offset_granularity='point' needs a fixed sampling_ratio (at least 1), got 0")
        self.align = RoIAlign(output_size, sampling_ratio)
        self.base = self.align if base is None else make_op(base, output_size, channels, levels)
        self.gamma = gamma
        self.per_point = offset_granularity == "point"
        h, w = self.output_size
        points = (h * sampling_ratio, w * sampling_ratio) if self.per_point else (h, w)
        inputs = self.base.output_channels(channels) * h * w
        self.offset_predictor = nn.ModuleList(
            OffsetPredictor(inputs, points, predictor_width, predictor_depth, modulation_depth, modulated)
            for _ in range(levels if predictor == "per_level" else 1)
        )

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        pooled = self.base(features, rois, levels, strides).features
        offsets, modulation = self.predict(pooled, levels)
        return RoIFeatures(self.pool(features, rois, levels, strides, offsets, modulation), offsets, modulation)

    def predict(self, pooled: Tensor, levels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Offsets [R, 2, points_h, points_w] and modulation [R, points_h, points_w] from features [R, C, h, w]."""
        if len(self.offset_predictor) == 1:
            return self.offset_predictor[0](pooled)
        if exporting():  # every predictor sees every RoI
            offsets, modulation = zip(*(predictor(pooled) for predictor in self.offset_predictor))
            own = levels, torch.arange(len(levels), device=levels.device)
            return torch.stack(offsets)[own], None if modulation[0] is None else torch.stack(modulation)[own]
        # every predictor sees every RoI of its level only; one without RoIs still takes part, with zero gradients
        order = levels.argsort(stable=True)
        parts = order.split(torch.bincount(levels, minlength=len(self.offset_predictor)).tolist())
        results = [predictor(pooled[part]) for predictor, part in zip(self.offset_predictor, parts)]
        back = order.argsort()
        offsets, modulation = zip(*results)
        return torch.cat(offsets)[back], None if modulation[0] is None else torch.cat(modulation)[back]

    def pool(
        self,
        features: Sequence[Tensor],
        rois: Tensor,
        levels: Tensor,
        strides: Sequence[float],
        offsets: Tensor,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """[R, C, h, w]: the pooling itself, for given offsets [R, 2, points_h, points_w] and modulation."""
        check_inputs(features, rois, levels, strides)
        if self.align.fused(features, rois):
            from detector.roi.triton_align import roi_align_fused

            settings = self.output_size, self.align.sampling_ratio, True, offsets, modulation, self.gamma
            return roi_align_fused(features, rois, levels, strides, *settings)
        regions = locate(features, rois, levels, strides)
        shift = self.gamma * offsets.to(regions.boxes.dtype)
        if choose_path(features[0], ("triton", "bag", "plain")) == "plain":
            return self.plain(features, regions, shift, modulation)
        axes = self.point_axes if self.per_point else self.align.axes
        y, x = axes(regions, shift[:, 0], shift[:, 1])
        if modulation is not None:
            if self.per_point:
                modulation = group_points(modulation, *self.output_size)[..., None]
            else:
                modulation = modulation[..., None, None]
            y = y._replace(weights=y.weights * modulation.to(y.weights.dtype))
        return pool_cells(features, regions, y, x)

    def plain(self, features: Sequence[Tensor], regions: Regions, shift: Tensor, modulation: Tensor | None) -> Tensor:
        """[R, C, h, w] by torchvision's op: every bin, or point, is a box, moved by shift [R, 2, *, *]."""
        size, ratio = shift.shape[2:], 1 if self.per_point else self.align.sampling_ratio
        extent = (regions.boxes[:, 2:] - regions.boxes[:, :2])[:, None, None]
        boxes = bins(regions, size) + (shift.permute(0, 2, 3, 1) * extent).repeat(1, 1, 1, 2)
        values = as_maps(align_boxes(features, regions, boxes.flatten(1, 2), (1, 1), ratio, True), size)
        values = values if modulation is None else values * modulation[:, None].to(values.dtype)
        return F.avg_pool2d(values, self.align.sampling_ratio) if self.per_point else values

    def point_axes(self, regions: Regions, shift_x: Tensor, shift_y: Tensor) -> tuple[Axis, Axis]:
        """As RoIAlign.axes, for shifts [R, h * s, w * s] of single points: a bin reads s * s groups of 2 x 2 cells."""
        x1, y1, x2, y2 = regions.boxes.unbind(1)
        n = torch.arange(self.align.sampling_ratio, device=shift_x.device)
        y = self.align.grid(y1, y2, self.output_size[0]).at(n).flatten(1)  # [R, h * s]
        x = self.align.grid(x1, x2, self.output_size[1]).at(n).flatten(1)
        y = group_points(y[:, :, None] + shift_y * (y2 - y1)[:, None, None], *self.output_size)
        x = group_points(x[:, None] + shift_x * (x2 - x1)[:, None, None], *self.output_size)
        y_axis, x_axis = at_points(x, y, regions)
        return y_axis._replace(weights=y_axis.weights / y.shape[3]), x_axis
