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
from torch import Tensor, nn

from detector.roi.align import RoIAlign, mean_weights
from detector.roi.bag import pool_cells
from detector.roi.base import RoIOp, check_choice, check_inputs, make_op
from detector.roi.geometry import Axis, bilinear, locate
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
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
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
        regions = locate(features, rois, levels, strides)
        x1, y1, x2, y2 = regions.boxes.unbind(1)
        y, y_counts = self.align.points(y1, y2, self.output_size[0])  # [R, h, S]
        x, x_counts = self.align.points(x1, x2, self.output_size[1])
        shift = self.gamma * offsets.to(regions.boxes.dtype)
        shift_x = shift[:, 0] * (x2 - x1)[:, None, None]
        shift_y = shift[:, 1] * (y2 - y1)[:, None, None]
        if self.per_point:
            h, w, s = *self.output_size, y.shape[2]
            y = y.flatten(1)[:, :, None] + shift_y
            x = x.flatten(1)[:, None] + shift_x
            y, x = (v.view(-1, h, s, w, s).transpose(2, 3).reshape(-1, h, w, s * s, 1) for v in (y, x))
        else:  # the points of a bin move together and stay a grid
            y = (y[:, :, None] + shift_y[..., None])[:, :, :, None]  # [R, h, w, 1, S]
            x = (x[:, None] + shift_x[..., None])[:, :, :, None]
        y_cells, y_weights = bilinear(y, regions.heights[:, None, None, None, None])
        x_cells, x_weights = bilinear(x, regions.widths[:, None, None, None, None])
        y_weights, x_weights = mean_weights(y_weights, y_counts), mean_weights(x_weights, x_counts)
        if modulation is not None:
            m = modulation.to(y_weights.dtype)
            if self.per_point:
                m = m.view(-1, h, s, w, s).transpose(2, 3).flatten(3)
            else:
                m = m[..., None]
            y_weights = y_weights * m[..., None, None]
        y = Axis(y_cells.flatten(4), y_weights.flatten(4))
        x = Axis(x_cells.flatten(4), x_weights.flatten(4))
        return pool_cells(features, regions, y, x)
