"""RoI Align ('Mask R-CNN', He et al. 2017, section 3): no coordinate is rounded, bins are bilinear samples.

    out[i, j] = mean (or max) over s_y x s_x points of f(x, y),
    y = y1 + (i + (n + 1/2) / s_y) * height / h for n = 0..s_y - 1, x likewise

with f the interpolation of the map, bilinear there. Dimensions: R RoIs, L levels, h x w bins, S points per bin along
one axis, K cells that the interpolation reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from detector.ops.checks import check_choice
from detector.roi.bag import CHUNK, max_of_runs, pool_cells, runs
from detector.roi.base import RoIOp, check_fixed, check_inputs, choose_path
from detector.roi.geometry import FAR, KERNELS, Axis, Regions, cells_between, interpolate, locate, per_level, share
from detector.roi.plain import align_boxes
from detector.structures import RoIFeatures


class RoIAlign(RoIOp):
    """RoI Align.

    Args:
        output_size: int or (h, w).
        sampling_ratio: points per bin and axis; 0 is adaptive, ceil(bin size in cells), as in Detectron. A list of L
            has one for each level; pairs such as [[0, 4], [32, 2], [96, 1]] one for RoIs from a size on, sqrt(w h) in
            pixels.
        aligned: whether cell i covers [i, i + 1), with its centre at i + 1/2. False reproduces the first release, which
            is off by half a cell and makes RoIs at least one cell wide.
        reduction: of the points of a bin, "avg" or "max". Points outside the map count with value 0.
        placement: of a point within its sub-cell, "centre" or, at the far end, "edge".
        kernel: of the interpolation, "bilinear", "bicubic" or "lanczos", see geometry.interpolate; the latter two read
            4 and 6 cells along an axis, some with negative weights.
        exact: without gradients, on a CPU, by torchvision's op: the sums in the order in which other frameworks take
            them, so that detections that nearly tie fall as there. It takes two to five times as long.

    A RoI that is reversed (x2 < x1) is read backwards (aligned) or as one cell wide (not aligned). In adaptive mode a
    RoI without extent reads nothing and gives 0. Parts outside the map, NaN and infinities give 0. Gradients reach
    the features and, where `rois` asks for one, the boxes.
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        sampling_ratio: int | Sequence[int] | Sequence[Sequence[float]] = 2,
        aligned: bool = True,
        reduction: str = "avg",
        placement: str = "centre",
        exact: bool = False,
        kernel: str = "bilinear",
    ):
        super().__init__(output_size)
        self.sampling_ratio, self.per_level, self.per_size = read_ratio(sampling_ratio)
        check_choice("reduction", reduction, ("avg", "max"))
        check_choice("placement", placement, ("centre", "edge"))
        check_choice("kernel", kernel, tuple(KERNELS))
        self.kernel = kernel
        self.aligned = aligned
        self.reduction = reduction
        self.placement = placement
        self.exact = exact

    def forward(
        self, features: Sequence[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[float]
    ) -> RoIFeatures:
        check_inputs(features, rois, levels, strides)
        if self.fused(features, rois):
            from detector.roi.triton_align import roi_align_fused

            settings = self.output_size, self.sampling_ratio, self.aligned
            return RoIFeatures(roi_align_fused(features, rois, levels, strides, *settings))
        regions = locate(features, rois, levels, strides)
        exact = self.exact and not torch.is_grad_enabled()
        if self.usual and (exact or choose_path(features[0], ("triton", "bag", "plain")) == "plain"):
            return RoIFeatures(self.plain(features, regions))
        ratios = None if self.usual else self.ratios(rois, regions.levels, strides)
        if self.reduction == "max":
            return RoIFeatures(self.pool_points(features, regions, ratios))
        return RoIFeatures(pool_cells(features, regions, *self.axes(regions, ratios=ratios)))

    @property
    def usual(self) -> bool:
        """Whether the points are those of one number, read bilinearly."""
        return self.per_level is None and self.per_size is None and self.kernel == "bilinear"

    def ratios(self, rois: Tensor, levels: Tensor, strides: Sequence[float]) -> int | Tensor:
        """The sampling ratio, one for all or [R] int32."""
        if self.per_level is not None:
            if len(self.per_level) != len(strides):
                raise ValueError(
                    f"sampling_ratio={self.per_level} must have one entry per level, of which there are {len(strides)}"
                )
            return per_level(levels, self.per_level, torch.int32)
        if self.per_size is None:
            return self.sampling_ratio
        sides = (rois[:, 3:] - rois[:, 1:3]).detach().abs().float()
        size = sides.prod(1).nan_to_num(0, posinf=FAR).sqrt()
        result = torch.zeros_like(levels, dtype=torch.int32)
        for least, ratio in self.per_size:
            result = torch.where(size >= least, ratio, result)
        return result

    def fused(self, features: Sequence[Tensor], rois: Tensor) -> bool:
        """Whether one kernel does it all: on a GPU, for the usual points and reduction, without a gradient of boxes."""
        usual = self.reduction == "avg" and self.placement == "centre" and not rois.requires_grad
        return usual and self.usual and choose_path(features[0], ("triton", "bag")) == "triton"

    def axes(
        self,
        regions: Regions,
        shift_x: Tensor | None = None,
        shift_y: Tensor | None = None,
        ratios: int | Tensor | None = None,
    ) -> tuple[Axis, Axis]:
        """Rows and columns that every bin reads, with weights that give the mean of its points.

        Args:
            shift_x, shift_y: [R, h, w], by how much each bin is moved, as a part of the RoI's width and height.
            ratios: as `ratios` gives them; None where sampling_ratio is one number.
        """
        x1, y1, x2, y2 = regions.boxes.unbind(1)
        h, w = self.output_size
        y, x = self.grid(y1, y2, h, ratios), self.grid(x1, x2, w, ratios)
        y, x = y._replace(first=y.first[:, :, None]), x._replace(first=x.first[:, None])
        if shift_x is not None and shift_y is not None:
            y = y._replace(first=y.first + shift_y * (y2 - y1)[:, None, None])
            x = x._replace(first=x.first + shift_x * (x2 - x1)[:, None, None])
        return mean_of_points(y, regions.heights, self.kernel), mean_of_points(x, regions.widths, self.kernel)

    def grid(self, start: Tensor, end: Tensor, bins: int, ratios: int | Tensor | None = None) -> Grid:
        """The points along one axis of RoIs from `start` to `end` [R]; ratios as in `axes`."""
        if self.aligned:
            start, end = start - 0.5, end - 0.5
        size = end - start if self.aligned else (end - start).clamp(min=1)
        bin_size = share(size, bins)
        first = start[:, None] + torch.arange(bins, device=start.device) * bin_size[:, None]
        counts: Tensor | int = bin_size.detach().ceil().clamp(min=0)
        most, listed = None, self.per_level or [ratio for _, ratio in self.per_size or ()]
        if isinstance(ratios, Tensor):
            counts = torch.where(ratios > 0, ratios.to(bin_size.dtype), counts)
            most = max(listed) if min(listed) > 0 else None
        elif ratio := self.sampling_ratio if ratios is None else ratios:
            counts = ratio
        return Grid(first, bin_size, counts, 0.5 if self.placement == "centre" else 1, most)

    def plain(self, features: Sequence[Tensor], regions: Regions) -> Tensor:
        """[R, C, h, w] by torchvision's op. For a maximum it gives the points, of which the largest are taken."""
        (h, w), (x1, y1, x2, y2) = self.output_size, regions.boxes.unbind(1)
        if self.placement == "edge":
            shift = [(0.5 * g.bin_size / g.counts) for g in (self.grid(x1, x2, w), self.grid(y1, y2, h))]
            regions = regions._replace(boxes=regions.boxes + torch.stack(shift * 2, 1).nan_to_num(0))
        if self.reduction == "avg":
            settings = (h, w), self.sampling_ratio, self.aligned
            return align_boxes(features, regions, regions.boxes[:, None], *settings)[:, 0]
        if self.sampling_ratio == 0:
            check_fixed("the number of points follows the RoI's size")
        s = self.sampling_ratio
        values = align_boxes(features, regions, regions.boxes[:, None], (h * s, w * s), 1, self.aligned)[:, 0]
        return F.max_pool2d(values, s)

    def pool_points(self, features: Sequence[Tensor], regions: Regions, ratios: int | Tensor | None) -> Tensor:
        """[R, C, h, w], the maximum over the points of every bin.

        First every point is a bag of its own, then the points are a table, and every bin a bag of it. Few RoIs at a
        time, for there are many more points than bins; the backward pass computes them anew.
        """
        check_fixed("the maximum of points that are not read bilinearly, or whose number follows the RoI")
        x1, y1, x2, y2 = regions.boxes.unbind(1)
        h, w = self.output_size
        y, y_there = points(self.grid(y1, y2, h, ratios), regions.heights)  # [R, h, Sy]
        x, x_there = points(self.grid(x1, x2, w, ratios), regions.widths)  # [R, w, Sx]

        def pool(at: slice) -> Tensor:
            there = y_there[at, :, None, :, None] & x_there[at, None, :, None, :]  # [r, h, w, Sy, Sx]
            roi, i, j, n, m = there.nonzero(as_tuple=True)
            own = Regions(*(t[at][roi] for t in regions))
            y_axis = one_point(y[at][roi, i, n], own.heights, self.kernel)
            x_axis = one_point(x[at][roi, j, m], own.widths, self.kernel)
            values = pool_cells(features, own, y_axis, x_axis)
            counts = there.flatten(3).sum(3).flatten()
            return max_of_runs(values.flatten(1), counts).view(-1, h, w, features[0].shape[1])

        costs = y_there.flatten(1).sum(1) * x_there.flatten(1).sum(1) * features[0].shape[1]
        parts = [checkpoint(pool, at, use_reentrant=False) for at in runs(costs, CHUNK)]
        return torch.cat(parts).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, "
            f"sampling_ratio={self.per_level or self.per_size or self.sampling_ratio}, aligned={self.aligned}, "
            f"reduction={self.reduction!r}, placement={self.placement!r}, kernel={self.kernel!r}"
        )


def read_ratio(
    ratio: int | Sequence[int] | Sequence[Sequence[float]],
) -> tuple[int, list[int] | None, list[tuple[float, int]] | None]:
    """One ratio for all, 0 where there are several; one for each level; pairs of sizes, which rise from 0, and ratios.

    ValueError unless it is an int >= 0, a list of them, or such pairs.
    """
    if isinstance(ratio, int):
        if ratio >= 0:
            return ratio, None, None
    elif isinstance(ratio, Sequence) and len(ratio):
        of_levels = [entry for entry in ratio if isinstance(entry, int) and entry >= 0]
        if len(of_levels) == len(ratio):
            return 0, of_levels, None
        pairs = [(entry[0], entry[1]) for entry in ratio if isinstance(entry, Sequence) and len(entry) == 2]
        sizes, ratios = [size for size, _ in pairs], [int(n) for _, n in pairs if isinstance(n, int) and n >= 0]
        rising = sizes[:1] == [0] and all(b > a for a, b in zip(sizes, sizes[1:]))
        if len(ratios) == len(ratio) and rising:
            return 0, None, list(zip(sizes, ratios))
    raise ValueError(
        f"sampling_ratio must be an int >= 0 (0 is adaptive), a list of them, one per level, or pairs of sizes, "
        f"from 0 upwards, and ratios such as [[0, 4], [32, 2]], got {ratio!r}"
    )


class Grid(NamedTuple):
    """Points along one axis: point n of a bin lies at first + (n + far) * bin_size / counts."""

    first: Tensor  # [R, ...] where the bins begin, in cells
    bin_size: Tensor  # [R]
    counts: Tensor | int  # [R] points per bin, or one number for all
    far: float  # 1/2 for the centre of a sub-cell, 1 for its end
    most: int | None = None  # an upper bound of the counts, where it does not depend on the RoIs

    def at(self, n: Tensor) -> Tensor:
        """Positions [R, ..., *] of the points n, [*] or [R, ..., *]."""
        shape = (-1, *[1] * max(n.ndim - 1, self.first.ndim))
        counts = self.counts if isinstance(self.counts, int) else self.counts.clamp(min=1).view(shape)
        first = self.first.reshape(*self.first.shape, *[1] * (len(shape) - self.first.ndim))
        return first + (n + self.far) * self.bin_size.view(shape) / counts


def mean_of_points(grid: Grid, size: Tensor, kernel: str) -> Axis:
    """The cells that the points of each bin touch, weighted for the mean: `grid.first` is [R, h or 1, w or 1]."""
    if not isinstance(grid.counts, int):
        return mean_of_counted_points(grid, grid.counts, size, kernel)
    positions, _ = points(grid, size)
    cells, weights = interpolate(positions, size.view(-1, 1, 1, 1), kernel)  # [R, h, w, S, K]
    return Axis(cells.flatten(3)[:, :, :, None], (weights / grid.counts).flatten(3)[:, :, :, None])


def mean_of_counted_points(grid: Grid, counts: Tensor, size: Tensor, kernel: str) -> Axis:
    """The same where every RoI has a number of points of its own: many touch the same cells, which lie side by side, so
    their weights are added up."""
    reach = KERNELS[kernel] // 2
    positions, there = points(grid, size)
    last = size.view(-1, 1, 1, 1) - 1
    cells, weights = interpolate(positions, last + 1, kernel)  # [R, h, w, S, K]
    weights = torch.where(there[..., None], weights, 0) / counts.clamp(min=1).view(-1, 1, 1, 1, 1)
    if grid.most is not None:
        used = (counts * KERNELS[kernel]).int()
        return Axis(cells.flatten(3)[:, :, :, None], weights.flatten(3)[:, :, :, None], used)
    ends = torch.stack([torch.zeros_like(counts), counts - 1], 1)[:, None, None]
    lowest, highest = grid.at(ends).detach().clamp(min=0).minimum(last).sort(3).values.int().unbind(3)
    lowest, end = (lowest - (reach - 1)).clamp(min=0), (highest + 1 + reach).minimum(last[..., 0] + 1)
    touched, _, used = cells_between(lowest, end, size)
    place = (cells - lowest[..., None, None]).clamp(0, touched.shape[3] - 1).flatten(3).long()
    weights = weights.new_zeros(touched.shape).scatter_add(3, place, weights.flatten(3))
    return Axis(touched[:, :, :, None], weights[:, :, :, None], used)


def points(grid: Grid, size: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [R, ..., S] of the points of bins, and which exist."""
    if not isinstance(grid.counts, int):
        return counted_points(grid, grid.counts, size)
    positions = grid.at(torch.arange(grid.counts, dtype=grid.first.dtype, device=size.device))
    return positions, torch.ones_like(positions, dtype=torch.bool)


def counted_points(grid: Grid, counts: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The same where every RoI has a number of points of its own. Of a bin with more points than fit the map, those
    around the map: the others read 0, as their neighbours here do."""
    if grid.most is not None:
        n = torch.arange(grid.most, dtype=grid.first.dtype, device=size.device)
        positions = grid.at(n)
        return positions, (n < counts.view(-1, *[1] * grid.first.ndim)).expand(positions.shape)
    check_fixed("the number of points follows the RoI's size")
    shape = (-1, *[1] * (grid.first.ndim - 1))
    counts = counts.view(shape)
    step = grid.bin_size.detach().view(shape) / counts.clamp(min=1)
    edge = torch.where(step < 0, size.view(shape), -1)  # where a row of points enters the map, if it begins outside
    before = torch.where(step != 0, (edge - grid.first.detach()) / step - grid.far, 0).nan_to_num(0).floor()
    before = before.clamp(min=0).minimum((counts - 1).clamp(min=0))
    most = min(int(counts.max()), 2 * int(size.max()) + 5) if len(counts) else 1
    n = before[..., None] + torch.arange(most, device=size.device)
    return grid.at(n), n < counts[..., None]


def one_point(position: Tensor, size: Tensor, kernel: str) -> Axis:
    """Axis of bags that read one point each, [P]."""
    return Axis(*(t[:, None, None, None] for t in interpolate(position, size, kernel)))
