"""Position-sensitive RoI methods ('R-FCN', Dai et al. 2016, equation 1): every bin reads channels of its own.

    out[d, i, j] = mean over bin (i, j) of channel (d h + i) w + j

so D * h * w channels give D. They are the result of a layer of the method's own, 1 x 1 as there, or of the network. As
in the paper's release the groups of channels may be fewer than the bins: with g_h x g_w of them bin (i, j) reads group
(floor(i g_h / h), floor(j g_w / w)). 'Deformable convolutional networks' (Dai et al. 2017, section 2.2) moves every bin
by an offset, predicted by a convolution whose result is pooled position-sensitively in turn.

The G groups of channels, each a map [N, D, H, W], are laid on top of each other as one tall map [N, D, G*H, W]; a bin
of group g then reads its rows H * g further down, and the rest is as in the plain methods.
Dimensions: N images, R RoIs, D output channels, h x w bins, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detector.ops.checks import check_choice, check_counts
from detector.ops.layers import init_zero
from detector.roi.align import RoIAlign
from detector.roi.bag import pool_cells
from detector.roi.base import RoIOp, check_inputs, choose_path, pair
from detector.roi.geometry import Axis, Regions, cells_between, locate, share
from detector.roi.plain import mean_between
from detector.roi.pool import round_half_away
from detector.structures import RoIFeatures


def stacked(features: Sequence[Tensor], groups: int) -> list[Tensor]:
    """Maps [N, D * G, H, W] as tall ones [N, D, G * H, W], channels_last: those of group g from row g H on."""
    tall = (f.unflatten(1, (-1, groups)).permute(0, 2, 3, 4, 1).flatten(1, 2) for f in features)  # [N, G * H, W, D]
    return [t.permute(0, 3, 1, 2) for t in tall]


def pool_groups(features: Sequence[Tensor], regions: Regions, y: Axis, x: Axis, group: Tensor, groups: int) -> Tensor:
    """pool_cells [R, D, h, w] of maps with D * `groups` channels, bins from their `group` [1, h, w] int32."""
    rows = y.cells + (group * regions.heights[:, None, None])[..., None, None]
    y = Axis(rows, y.weights.expand(rows.shape), y.used)
    return pool_cells(stacked(features, groups), regions._replace(heights=regions.heights * groups), y, x)


class PositionSensitive(RoIOp):
    """What the position-sensitive methods share: their channels, and how bins read them.

    Args:
        output_size: int or (h, w).
        channels: C of the features.
        out_channels: D, made of them by a 1 x 1 convolution `maps` to D * G channels, which all levels share; None: the
            features have D * G channels themselves.
        group_size: groups of channels, an int or (g_h, g_w); None: as many as bins.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int | None = None,
        out_channels: int | None = None,
        group_size: int | Sequence[int] | None = None,
    ):
        super().__init__(output_size)
        self.group_size = self.output_size if group_size is None else pair(group_size, "group_size")
        self.groups = self.group_size[0] * self.group_size[1]
        self.maps: nn.Module | None = None
        self.own_channels = None if out_channels is None else out_channels * self.groups
        if out_channels is not None:
            check_counts(out_channels=out_channels)
            if channels is None:
                raise ValueError(f"channels must be the features' where out_channels={out_channels} is given, got None")
            self.maps = nn.Conv2d(channels, out_channels * self.groups, 1)

    def output_channels(self, channels: int) -> int:
        """D; ValueError where the features' channels are not a multiple of the groups."""
        channels = channels if self.own_channels is None else self.own_channels
        if channels % self.groups:
            raise ValueError(
                f"features have {channels} channels, expected a multiple of h * w = {self.groups}; "
                f"out_channels=10 makes {10 * self.groups} of them by a layer of the method's own"
            )
        return channels // self.groups

    def own_maps(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """The maps [N, D * G, Hl, Wl] that bins read."""
        self.output_channels(features[0].shape[1])
        return features if self.maps is None else [self.maps(f) for f in features]

    def group(self, device: torch.device) -> Tensor:
        """The group of each bin, [1, h, w] int32."""
        i, j = (torch.arange(n, device=device) * g // n for n, g in zip(self.output_size, self.group_size))
        return (i[:, None] * self.group_size[1] + j)[None].int()

    def pool(self, maps: Sequence[Tensor], regions: Regions, y: Axis, x: Axis) -> Tensor:
        """[R, D, h, w]: every bin from its own channels of `own_maps`."""
        return pool_groups(maps, regions, y, x, self.group(regions.heights.device), self.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


class PositionSensitiveRoIPool(PositionSensitive):
    """Position-sensitive average pooling of a rounded RoI.

    Args:
        output_size, channels, out_channels, group_size: see PositionSensitive.
        quantization: "rfcn", the paper's release: corners rounded in the image, the end pixel included, at least 0.1
            cells, bins from floor to ceil; or "torchvision": corners rounded on the map, the end excluded, at least one
            cell, and the last row and column of the map never read.

    Bins without a cell on the map give 0, as do RoIs with NaN or an infinity. Gradients reach the features.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        quantization: str = "rfcn",
        channels: int | None = None,
        out_channels: int | None = None,
        group_size: int | Sequence[int] | None = None,
    ):
        super().__init__(output_size, channels, out_channels, group_size)
        check_choice("quantization", quantization, ("rfcn", "torchvision"))
        self.quantization = quantization

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        maps = self.own_maps(features)
        if self.quantization == "rfcn":
            corners = round_half_away(rois[:, 1:].detach().to(torch.promote_types(rois.dtype, torch.float32)))
            rois = torch.cat([rois[:, :1].to(corners), corners[:, :2], corners[:, 2:] + 1], 1)
        regions = locate(features, rois, levels, strides)
        if choose_path(features[0], ("bag", "plain")) == "plain":
            x1, y1, x2, y2 = regions.boxes.detach().unbind(1)
            rows = self.ranges(y1, y2, self.output_size[0], regions.heights)
            columns = self.ranges(x1, x2, self.output_size[1], regions.widths)
            start = self.group(rois.device) * regions.heights[:, None, None]
            row_ranges, column_ranges = [r[:, :, None] + start for r in rows], [c[:, None] for c in columns]
            return RoIFeatures(mean_between(stacked(maps, self.groups), regions, row_ranges, column_ranges))
        return RoIFeatures(self.pool(maps, regions, *self.axes(regions)))

    def axes(self, regions: Regions) -> tuple[Axis, Axis]:
        """Which rows and columns of the map every bin of the R regions reads, and with what weights: (y, x)."""
        x1, y1, x2, y2 = regions.boxes.detach().unbind(1)
        rows, row_weights, y_used = self.mean_of_cells(y1, y2, self.output_size[0], regions.heights)
        columns, column_weights, x_used = self.mean_of_cells(x1, x2, self.output_size[1], regions.widths)
        y = Axis(rows[:, :, None, None], row_weights[:, :, None, None], y_used)
        return y, Axis(columns[:, None, :, None], column_weights[:, None, :, None], x_used)

    def mean_of_cells(self, start: Tensor, end: Tensor, bins: int, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells [R, bins, K] int32, their equal weights, 0 past the bin's last cell, and the cells of a RoI's bins."""
        cells, there, used = cells_between(*self.ranges(start, end, bins, size), size)
        return cells, there.to(start.dtype) / there.sum(2, keepdim=True).clamp(min=1), used

    def ranges(self, start: Tensor, end: Tensor, bins: int, size: Tensor) -> tuple[Tensor, Tensor]:
        """First cell of every bin and the one past its last, [R, bins] int32 each."""
        i = torch.arange(bins + 1, device=start.device)
        if self.quantization == "rfcn":
            bin_size = share((end - start).clamp(min=0.1), bins)[:, None]
            start, limit = start[:, None], size[:, None]
            low, high = (i[:-1] * bin_size + start).floor(), (i[1:] * bin_size + start).ceil()
        else:
            start, end = round_half_away(start), round_half_away(end)
            bin_size = share((end - start).clamp(min=1), bins)[:, None]
            start, limit = start[:, None], size[:, None] - 1
            low, high = (i[:-1] * bin_size).floor() + start, (i[1:] * bin_size).ceil() + start
        low, high = (v.clamp(min=0).minimum(limit).int() for v in (low, high))
        return low, high

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, quantization={self.quantization!r}"


class PositionSensitiveRoIAlign(PositionSensitive):
    """Position-sensitive RoI Align, the mean of bilinear samples; cell centres at i + 1/2 (aligned).

    Args:
        output_size, channels, out_channels, group_size: see PositionSensitive.
        sampling_ratio: points per bin and axis, 0 is adaptive.

    RoIs of odd kinds, and gradients, as in RoIAlign.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        sampling_ratio: int = 2,
        channels: int | None = None,
        out_channels: int | None = None,
        group_size: int | Sequence[int] | None = None,
    ):
        super().__init__(output_size, channels, out_channels, group_size)
        self.align = RoIAlign(output_size, sampling_ratio)

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        regions = locate(features, rois, levels, strides)
        return RoIFeatures(self.pool(self.own_maps(features), regions, *self.align.axes(regions)))


class DeformablePositionSensitiveRoIPool(PositionSensitive):
    """Deformable position-sensitive RoI pooling: every bin moves by gamma * offset * (width, height) of the RoI.

    Args:
        output_size, channels, out_channels, group_size: see PositionSensitive.
        sampling_ratio: points per bin and axis. gamma: scale of the offsets.

    The offsets come from a 1 x 1 convolution `offset_predictor` of the features to 2 * h * w channels, shared by all
    levels and all output channels, pooled by PositionSensitiveRoIAlign. It starts at zero, and the op as
    PositionSensitiveRoIAlign.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        channels: int,
        sampling_ratio: int = 4,
        gamma: float = 0.1,
        out_channels: int | None = None,
        group_size: int | Sequence[int] | None = None,
    ):
        super().__init__(output_size, channels, out_channels, group_size)
        self.output_channels(channels)
        self.align = PositionSensitiveRoIAlign(output_size, sampling_ratio)
        self.gamma = gamma
        h, w = self.output_size
        self.offset_predictor = nn.Conv2d(channels, 2 * h * w, 1)
        init_zero(self.offset_predictor)

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        fields = [self.offset_predictor(f) for f in features]
        offsets = self.align(fields, rois, levels, strides).features
        regions = locate(features, rois, levels, strides)
        shift = self.gamma * offsets.to(regions.boxes.dtype)
        y, x = self.align.align.axes(regions, shift[:, 0], shift[:, 1])
        return RoIFeatures(self.pool(self.own_maps(features), regions, y, x), offsets)
