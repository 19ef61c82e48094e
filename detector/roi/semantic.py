"""Semantic RoI Align ('Semantic-aware transformation-invariant RoI Align', Yang et al. 2024): areas instead of bins.

    x_p = f_p + E area_p,    a_k = softmax over p of (V relu(U_1 x_p + U_2 g))_k,    out_k = sum over p of a_kp x_p

The points p are a grid over the RoI with as many rows to columns as the RoI is high to wide (the dynamic feature
sampler); f_p is the map there, g the mean of all f_p, area_p the four sides of p's cell of the grid, as parts of the
RoI (the area embedding's input). Every output k is an area that attention finds by what is there: it follows an object
that turns or bends, and has no place of its own, so it suits box heads and not those that predict maps. The structure
is the paper's; the width of the attention and the form of the embedding are chosen here.
Dimensions: R RoIs, C channels, P points, h x w outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detector.ops.checks import check_counts
from detector.roi.bag import pool_cells
from detector.roi.base import RoIOp, check_inputs
from detector.roi.geometry import Regions, at_points, locate
from detector.structures import RoIFeatures


class SemanticRoIAlign(RoIOp):
    """RoI features of areas that attention finds.

    Args:
        output_size: h * w areas, an int or (h, w). channels: C of the features.
        samples: points of a RoI at most; a grid of rows x columns of them is as near its aspect ratio as they allow.
        width: hidden units of the attention.

    A RoI that is reversed is read backwards; one without extent in one direction as a line of points. Gradients reach
    features and boxes.
    """

    def __init__(self, output_size: int | Sequence[int], channels: int, samples: int = 64, width: int = 256):
        super().__init__(output_size)
        check_counts(samples=samples, width=width)
        self.samples = samples
        self.area = nn.Linear(4, channels)
        self.local = nn.Linear(channels, width)
        self.whole = nn.Linear(channels, width, bias=False)
        self.attention = nn.Linear(width, self.output_size[0] * self.output_size[1])

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        regions = locate(features, rois, levels, strides)
        areas, there = self.grid(regions)
        boxes = regions.boxes[:, None]
        centres = boxes[..., :2] + areas.view(*areas.shape[:2], 2, 2).mean(2) * (boxes[..., 2:] - boxes[..., :2]) - 0.5
        x, y = (t[:, :, None, None] for t in centres.unbind(2))
        values = pool_cells(features, regions, *at_points(x, y, regions))[..., 0].mT  # [R, P, C]
        mean = (values * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        values = values + self.area(areas.to(values.dtype))
        hidden = (self.local(values) + self.whole(mean.to(values.dtype))[:, None]).relu()
        logits = self.attention(hidden).masked_fill(~there[..., None], -torch.inf)
        return RoIFeatures((values.mT @ logits.softmax(1).to(values.dtype)).unflatten(2, self.output_size))

    def grid(self, regions: Regions) -> tuple[Tensor, Tensor]:
        """Cells of each RoI's grid [R, P, 4] = (x1, y1, x2, y2), parts of its sides, and which of the P there are."""
        width, height = (regions.boxes[:, 2:] - regions.boxes[:, :2]).detach().abs().unbind(1)
        rows = (self.samples * (height / width).nan_to_num(1)).sqrt().round().clamp(1, self.samples)[:, None]
        columns = (self.samples / rows).floor()
        p = torch.arange(self.samples, device=rows.device)
        row, column = (p / columns).floor(), p % columns
        cells = torch.stack([column / columns, row / rows, (column + 1) / columns, (row + 1) / rows], 2)
        return cells, p < rows * columns

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, samples={self.samples}"
