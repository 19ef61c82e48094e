"""The path "plain": RoI methods in operators that torch.export and ONNX know. Exported programs take it.

Their shapes must be known before the data is. Bags of a fixed length are summed cell by cell (bag.py); where the number
of cells follows the size of the RoI, a bin is a box for torchvision's roi_align or roi_pool, which ONNX has too.
Dimensions: R RoIs, B boxes per RoI, C channels, h x w bins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align, roi_pool

from detector.roi.geometry import Regions


def align_boxes(
    features: Sequence[Tensor], regions: Regions, boxes: Tensor, output_size: Sequence[int], *settings: int | bool
) -> Tensor:
    """RoI Align [R, B, C, *output_size] of boxes [R, B, 4] in cells; settings: sampling_ratio, aligned."""
    return on_levels(features, regions, boxes, lambda *where: roi_align(*where, output_size, 1.0, *settings))


def mean_between(
    features: Sequence[Tensor], regions: Regions, rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> Tensor:
    """Means [R, C, h, w] over the cells from the first of `rows` [R, h, 1 or w] up to but without the second, which are
    on the map, and of `columns` [R, 1, w]; 0 for a bin without cells.

    As many samples as cells, on the cells: RoI Align reads just them.
    """
    boxes = torch.stack(torch.broadcast_tensors(columns[0], rows[0], columns[1], rows[1]), 3).to(regions.boxes.dtype)
    return as_maps(align_boxes(features, regions, boxes.flatten(1, 2), (1, 1), 0, True), boxes.shape[1:3])


def max_between(
    features: Sequence[Tensor], regions: Regions, rows: Sequence[Tensor], columns: Sequence[Tensor]
) -> Tensor:
    """As `mean_between`, the maximum."""
    sides = torch.broadcast_tensors(columns[0], rows[0], columns[1] - 1, rows[1] - 1)
    boxes = torch.stack(sides, 3).to(regions.boxes.dtype)
    some = (boxes[..., 2:] >= boxes[..., :2]).all(3)
    maxima = on_levels(features, regions, boxes.flatten(1, 2), lambda *where: roi_pool(*where, (1, 1)))
    return as_maps(maxima, boxes.shape[1:3]) * some[:, None]


def bins(regions: Regions, size: Sequence[int]) -> Tensor:
    """Boxes [R, h, w, 4] of the bins that divide the RoIs, in cells."""
    start, extent = regions.boxes[:, None, :2], (regions.boxes[:, 2:] - regions.boxes[:, :2])[:, None]
    y, x = torch.meshgrid(*(torch.arange(n, device=start.device) for n in size), indexing="ij")
    grid, counts = torch.stack([x, y], 2).flatten(0, 1), start.new_tensor(size).flip(0)
    boxes = torch.cat([start + grid * extent / counts, start + (grid + 1) * extent / counts], 2)
    return boxes.unflatten(1, y.shape)


def as_maps(values: Tensor, size: Sequence[int]) -> Tensor:
    """[R, h * w, C, 1, 1] as [R, C, h, w]."""
    return values.flatten(2).mT.unflatten(2, size)


def on_levels(
    features: Sequence[Tensor], regions: Regions, boxes: Tensor, pool: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """pool(map, RoIs [*, 5] in its cells) for boxes [R, B, 4], each on the map that its RoI reads: [R, B, ...]."""
    images = regions.images[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat([images.to(boxes.dtype), boxes], 2)
    parts = []
    for level, feature in enumerate(features):
        rows = torch.nonzero(regions.levels == level)[:, 0]
        pooled = pool(feature.to(boxes.dtype), rois[rows].flatten(0, 1))
        parts.append((rows, pooled.view(rows.shape[0], boxes.shape[1], *pooled.shape[1:])))
    found = parts[0][1].new_zeros(len(boxes), *parts[0][1].shape[1:])
    for rows, pooled in parts:
        found = found.index_put((rows,), pooled)
    return found.to(features[0].dtype)
