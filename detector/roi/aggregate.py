"""Methods that read every level for every RoI, whatever its size; the assigned level is ignored.

- all levels summed: the plainest way not to choose a level;
- GRoIE ('A novel region of interest extraction layer for instance segmentation', Rossi et al. 2020): a convolution on
  each level's result, their sum, then attention over the bins.
Dimensions: R RoIs, C channels, h x w bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from detector.ops.checks import check_choice
from detector.ops.layers import init_zero
from detector.roi.base import RoIOp, check_inputs
from detector.roi.wrapped import WrappedRoIOp
from detector.structures import RoIFeatures


class SumLevels(WrappedRoIOp):
    """The sum over all levels of what a RoI method makes of each.

    Args:
        output_size: int or (h, w). channels: C of the features.
        op: factory of the method, RoIAlign with its defaults if None. It must not return offsets.
    """

    def __init__(self, output_size: int | Sequence[int], channels: int, op: Callable[..., RoIOp] | None = None):
        super().__init__(output_size, channels, op)

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        first = torch.zeros_like(levels)
        results = [self.op([f], rois, first, [stride]).features for f, stride in zip(features, strides)]
        return RoIFeatures(self.aggregate(results))

    def aggregate(self, results: list[Tensor]) -> Tensor:
        """[R, C, h, w] from one such result per level."""
        return sum(results[1:], results[0])


class GRoIE(SumLevels):
    """Generic RoI extraction layer: 5 x 5 convolution on every level's result, sum, attention over the bins.

    Args:
        output_size, channels, op: as in SumLevels.
        kernel: size of the convolution, which all levels share, odd.
        attention: between the bins, by "content" (NonLocal), by "position" (PositionAttention), or as "mmdetection"
            publishes it (PositionAttention, crossed).
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        op: Callable[..., RoIOp] | None = None,
        kernel: int = 5,
        attention: str = "content",
    ):
        super().__init__(output_size, channels, op)
        check_choice("attention", attention, ("content", "position", "mmdetection"))
        channels = self.op.output_channels(channels)
        self.before = nn.Sequential(nn.Conv2d(channels, channels, kernel, padding=kernel // 2), nn.ReLU(inplace=True))
        self.after: NonLocal | PositionAttention
        if attention == "content":
            self.after = NonLocal(channels)
        else:
            self.after = PositionAttention(channels, crossed=attention == "mmdetection")

    def aggregate(self, results: list[Tensor]) -> Tensor:
        return self.after(super().aggregate([self.before(result) for result in results]))


class NonLocal(nn.Module):
    """x + W softmax(q k / sqrt(C / 2)) v over the bins, from W = 0 ('Non-local neural networks', Wang et al. 2018)."""

    def __init__(self, channels: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.project = nn.Conv2d(channels // 2, channels, 1)
        init_zero(self.project)

    def forward(self, x: Tensor) -> Tensor:
        # one head: [R, 1, h*w, C/2]
        query, key, value = (layer(x).flatten(2).mT[:, None] for layer in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.project(mixed.mT.unflatten(2, x.shape[2:]))


class PositionAttention(nn.Module):
    """x + gamma W sum over k of softmax(q_i p_ik) v_k, from gamma = 0: bin i looks at others by where they lie.

    q comes from bin i, v from every second bin k, and p from the distance between the two, as sines and cosines: term 2
    of 'An empirical study of spatial attention mechanisms in deep networks' (Zhu et al. 2019), with `heads` heads.
    crossed: in the vertical part, bin (y, x) asks with the q of bin (x, y). That is what mmcv computes, so what its
    models were trained with; such RoI features must be square.
    """

    scales: Tensor  # [C / 4], the wavelengths

    def __init__(self, channels: int, heads: int = 6, wavelength: float = 1000.0, crossed: bool = False):
        super().__init__()
        width = channels // heads * heads
        if width == 0 or channels % 4:
            raise ValueError(f"attention by position needs a multiple of 4 channels, at least {heads}, got {channels}")
        self.query, self.value = (nn.Conv2d(channels, width, 1, bias=False) for _ in range(2))
        self.distance_x, self.distance_y = (nn.Linear(channels // 2, width, bias=False) for _ in range(2))
        self.project = nn.Conv2d(width, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.heads, self.crossed = heads, crossed
        scales = wavelength ** (torch.arange(channels // 4) * 4 / channels)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.crossed and x.shape[2] != x.shape[3]:
            raise ValueError(f"attention='mmdetection' needs as many rows of bins as columns, got {list(x.shape[2:])}")
        query = self.query(x).unflatten(1, (self.heads, -1))  # [R, heads, d, h, w]
        value = self.value(x[..., ::2, ::2]).unflatten(1, (self.heads, -1))
        rows, columns = self.distances(self.distance_y, x.shape[2]), self.distances(self.distance_x, x.shape[3])
        by_column = torch.einsum("nmdyx,xkmd->nmyxk", query, columns.to(x.dtype))
        by_row = torch.einsum("nmdyx,ykmd->nmyxk", query.mT if self.crossed else query, rows.to(x.dtype))
        share = (by_row[..., :, None] + by_column[..., None, :]).flatten(-2).softmax(dim=-1)
        mixed = torch.einsum("nmyxk,nmdk->nmdyx", share, value.flatten(3))
        return x + self.gamma * self.project(mixed.flatten(1, 2))

    def distances(self, layer: nn.Linear, count: int) -> Tensor:
        """[count, every second, heads, d]: what `layer` makes of the distances between `count` bins, over sqrt(2)."""
        places = torch.arange(count, device=self.scales.device)
        angles = (places[:, None] - places[::2])[..., None] / self.scales
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(layer.weight.dtype)
        return layer(waves).unflatten(-1, (self.heads, -1)) / 2**0.5
