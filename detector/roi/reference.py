"""Every RoI method as its paper's equation, in plain loops and float64: to be read, and to test the fast code by.

A function pools one RoI from one map: `feature` is [C, H, W] float64, `box` is (x1, y1, x2, y2) in image pixels, `size`
is (h, w), and the result is [C, h, w]. `over_rois` applies one to a whole batch. The cell in row v and column u is
feature[:, v, u].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, cos, floor, isfinite, log2, pi, sin, sqrt
from typing import Any

import torch
from torch import Tensor


def over_rois(
    function: Callable[..., Tensor],
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: Sequence[float],
    *per_roi: Tensor,
    **settings: Any,
) -> Tensor:
    """`function` for every RoI [R, 5] on the map of its image and level, with row r of the `per_roi` tensors."""
    results = []
    for r in range(len(rois)):
        (image, *box), level = rois[r].tolist(), int(levels[r])
        feature = features[level][int(image)].double()
        extra = [t[r].double() for t in per_roi]
        results.append(function(feature, box, strides[level], *extra, **settings))
    return torch.stack(results)


def assign_level(
    box: Sequence[float], strides: Sequence[int], canonical_level: int = 4, canonical_size: float = 224
) -> int:
    """FPN's equation 1: k = floor(k0 + log2(sqrt(w h) / 224)), as an index into the strides."""
    x1, y1, x2, y2 = box
    level = floor(canonical_level + log2(sqrt((x2 - x1) * (y2 - y1)) / canonical_size))
    return min(max(level - int(log2(strides[0])), 0), len(strides) - 1)


def bilinear(feature: Tensor, y: float, x: float) -> Tensor:
    """Mask R-CNN, figure 3: the four cells around (x, y), each weighted by its nearness. [C].

    0 more than one cell away from the outermost cells; within that cell, the value at the edge.
    """
    _, height, width = feature.shape
    if not (-1 <= y <= height and -1 <= x <= width):  # NaN ends here too
        return feature.new_zeros(feature.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    value = feature.new_zeros(feature.shape[0])
    for v in {floor(y), ceil(y)}:
        for u in {floor(x), ceil(x)}:
            value = value + (1 - abs(y - v)) * (1 - abs(x - u)) * feature[:, v, u]
    return value


def round_half_away(value: float) -> int:
    """C's round."""
    return floor(value + 0.5) if value >= 0 else ceil(value - 0.5)


def roi_pool(feature: Tensor, box: Sequence[float], stride: float, size: tuple[int, int], quantization: str) -> Tensor:
    """Fast R-CNN, section 2.1: the maximum over the cells of a bin; the three ways to round of pool.py."""
    channels, height, width = feature.shape
    out = feature.new_zeros(channels, *size)
    if not all(map(isfinite, box)):
        return out
    x1, y1, x2, y2 = (c / stride for c in box)

    def cells(start: float, end: float, bins: int, i: int, limit: int) -> range:
        if quantization == "caffe":
            start, end = round_half_away(start), round_half_away(end)
            bin_size = max(end - start + 1, 1) / bins
            first, last = start + floor(i * bin_size), start + ceil((i + 1) * bin_size)
        elif quantization == "floor":
            start, end = floor(start), floor(end)
            extent = max(end - start, 0)
            first, last = start + i * extent // bins, start + (i + 1) * extent // bins
        else:
            start, end = floor(start), floor(end)
            bin_size = max(end - start, 0) // bins
            first, last = start + i * bin_size, start + (i + 1) * bin_size
        return range(min(max(first, 0), limit), min(max(last, 0), limit))

    for i in range(size[0]):
        for j in range(size[1]):
            rows, columns = cells(y1, y2, size[0], i, height), cells(x1, x2, size[1], j, width)
            if len(rows) and len(columns):
                out[:, i, j] = torch.stack([feature[:, v, u] for v in rows for u in columns]).amax(0)
    return out


def keys(t: float) -> float:
    """Keys 1981, equation 4 with a = -1/2."""
    t = abs(t)
    return 1.5 * t**3 - 2.5 * t**2 + 1 if t <= 1 else -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2 if t < 2 else 0.0


def lanczos(t: float) -> float:
    """sinc(t) sinc(t / 3) within 3 cells (Duchon 1979)."""
    return 1.0 if t == 0 else 3 * sin(pi * t) * sin(pi * t / 3) / (pi * t) ** 2 if abs(t) < 3 else 0.0


def interpolate(feature: Tensor, y: float, x: float, kernel: str) -> Tensor:
    """The map at (x, y) as a sum over cells weighted by a kernel of each axis; cells outside are those at its edge."""
    if kernel == "bilinear":
        return bilinear(feature, y, x)
    _, height, width = feature.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return feature.new_zeros(feature.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    weight = {"bicubic": keys, "lanczos": lanczos}[kernel]
    value, total = feature.new_zeros(feature.shape[0]), 0.0
    for v in range(floor(y) - 2, floor(y) + 4):
        for u in range(floor(x) - 2, floor(x) + 4):
            share = weight(y - v) * weight(x - u)
            value = value + share * feature[:, min(max(v, 0), height - 1), min(max(u, 0), width - 1)]
            total += share
    return value / total


def roi_align(
    feature: Tensor,
    box: Sequence[float],
    stride: float,
    offsets: Tensor | None = None,
    modulation: Tensor | None = None,
    *,
    size: tuple[int, int],
    sampling_ratio: int = 2,
    aligned: bool = True,
    reduction: str = "avg",
    placement: str = "centre",
    gamma: float = 0.1,
    kernel: str = "bilinear",
) -> Tensor:
    """Mask R-CNN, section 3; with offsets, Deformable ConvNets, equations 5 and 6; with modulation, v2's equation 2.

    offsets: [2, h, w] (dx, dy), one per bin, or [2, h * s, w * s], one per point. modulation: [h, w] or [h * s, w * s].
    """
    h, w = size
    x1, y1, x2, y2 = (c / stride - (0.5 if aligned else 0) for c in box)
    width, height = x2 - x1, y2 - y1
    if not aligned:
        width, height = max(width, 1), max(height, 1)
    out = feature.new_zeros(feature.shape[0], h, w)
    if not (isfinite(width) and isfinite(height)):
        return out
    rows = sampling_ratio or max(ceil(height / h), 0)
    columns = sampling_ratio or max(ceil(width / w), 0)
    for i in range(h):
        for j in range(w):
            values = []
            for n in range(rows):
                for m in range(columns):
                    far = 0.5 if placement == "centre" else 1
                    y = y1 + i * height / h + (n + far) * height / h / rows
                    x = x1 + j * width / w + (m + far) * width / w / columns
                    weight: Tensor | float = 1
                    per_bin = offsets is None or offsets.shape[1:] == size
                    at = (i, j) if per_bin else (i * rows + n, j * columns + m)
                    if offsets is not None:
                        x += gamma * width * float(offsets[0][at])
                        y += gamma * height * float(offsets[1][at])
                    if modulation is not None:
                        weight = modulation[at]
                    values.append(weight * interpolate(feature, y, x, kernel))
            if values:
                points = torch.stack(values)
                out[:, i, j] = points.mean(0) if reduction == "avg" else points.amax(0)
    return out


def roi_warp(
    feature: Tensor, box: Sequence[float], stride: float, size: tuple[int, int], sampling_ratio: int = 1
) -> Tensor:
    """Mask R-CNN's account of RoI Warp: the corners rounded as in RoI pooling, then bilinear samples."""
    if not all(map(isfinite, box)):
        return feature.new_zeros(feature.shape[0], *size)
    x1, y1, x2, y2 = (round_half_away(c / stride) for c in box)
    box = (x1, y1, max(x2, x1) + 1, max(y2, y1) + 1)
    return roi_align(feature, box, 1, size=size, sampling_ratio=sampling_ratio)


def precise_roi_pool(
    feature: Tensor, box: Sequence[float], stride: float, size: tuple[int, int], aligned: bool = False
) -> Tensor:
    """IoU-Net, equation 6: the integral of the interpolated map over a bin, divided by the bin's area.

    Between four cells the map is bilinear, and the mean of a bilinear function over a rectangle is its value at the
    centre. So cut the bin at the whole numbers and add up area times value there. Outside the map the cells are 0.
    """
    channels, height, width = feature.shape
    out = feature.new_zeros(channels, *size)
    x1, y1, x2, y2 = (c / stride - (0.5 if aligned else 0) for c in box)
    if not (x2 > x1 and y2 > y1 and all(map(isfinite, box))):
        return out
    padded = torch.nn.functional.pad(feature, (1, 1, 1, 1))  # the map falls to 0 within one cell

    def pieces(low: float, high: float, limit: int) -> list[tuple[float, float]]:
        low, high = max(low, -1), min(high, limit)
        cuts = [low, *range(floor(low) + 1, ceil(high)), high]
        return [(a, b) for a, b in zip(cuts, cuts[1:]) if b > a]

    bin_h, bin_w = (y2 - y1) / size[0], (x2 - x1) / size[1]
    for i in range(size[0]):
        for j in range(size[1]):
            for top, bottom in pieces(y1 + i * bin_h, y1 + (i + 1) * bin_h, height):
                for left, right in pieces(x1 + j * bin_w, x1 + (j + 1) * bin_w, width):
                    centre = bilinear(padded, (top + bottom) / 2 + 1, (left + right) / 2 + 1)
                    out[:, i, j] += (bottom - top) * (right - left) * centre / (bin_h * bin_w)
    return out


def position_sensitive(
    feature: Tensor,
    box: Sequence[float],
    stride: float,
    *per_roi: Tensor,
    method: Callable[..., Tensor],
    groups: tuple[int, int] | None = None,
    **settings: Any,
) -> Tensor:
    """R-FCN, equation 1: bin (i, j) of output channel d comes from channel (d h + i) w + j. [C / (h w), h, w].

    groups: (g_h, g_w) if they are not as many as the bins; then h and w are those, and i and j the bin's group.
    """
    h, w = settings["size"]
    g_h, g_w = groups or (h, w)
    plain = method(feature, box, stride, *per_roi, **settings)  # every channel in every bin
    out = plain.new_zeros(len(plain) // (g_h * g_w), h, w)
    for d in range(len(out)):
        for i in range(h):
            for j in range(w):
                out[d, i, j] = plain[(d * g_h + i * g_h // h) * g_w + j * g_w // w, i, j]
    return out


def average_pool(
    feature: Tensor, box: Sequence[float], stride: float, size: tuple[int, int], quantization: str
) -> Tensor:
    """The pooling of R-FCN's equation 1, before it picks channels: the mean over the cells of a bin.

    "rfcn" rounds in the image and includes the end pixel; "torchvision" rounds on the map and never reads its last row
    and column.
    """
    channels, height, width = feature.shape
    out = feature.new_zeros(channels, *size)
    if not all(map(isfinite, box)):
        return out

    def cells(start: float, end: float, bins: int, i: int, limit: int) -> range:
        if quantization == "rfcn":
            start, end = round_half_away(start) / stride, (round_half_away(end) + 1) / stride
            bin_size = max(end - start, 0.1) / bins
            first, last = floor(start + i * bin_size), ceil(start + (i + 1) * bin_size)
        else:
            start, end = round_half_away(start / stride), round_half_away(end / stride)
            bin_size = max(end - start, 1) / bins
            first, last = start + floor(i * bin_size), start + ceil((i + 1) * bin_size)
            limit -= 1
        return range(min(max(first, 0), limit), min(max(last, 0), limit))

    x1, y1, x2, y2 = box
    for i in range(size[0]):
        for j in range(size[1]):
            rows, columns = cells(y1, y2, size[0], i, height), cells(x1, x2, size[1], j, width)
            if len(rows) and len(columns):
                out[:, i, j] = torch.stack([feature[:, v, u] for v in rows for u in columns]).mean(0)
    return out


def sum_levels(features: Sequence[Tensor], rois: Tensor, strides: Sequence[float], **settings: Any) -> Tensor:
    """RoI Align of every RoI on every level, summed."""
    levels = [torch.full((len(rois),), level) for level in range(len(features))]
    return torch.stack([over_rois(roi_align, features, rois, each, strides, **settings) for each in levels]).sum(0)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution of x [C, h, w] with weight [D, C, k, k], cell by cell, zeros around the map: [D, h, w]."""
    _, h, w = x.shape
    reach = weight.shape[2] // 2
    out = x.new_zeros(len(weight), h, w) if bias is None else bias[:, None, None].repeat(1, h, w)
    for i in range(h):
        for j in range(w):
            for a in range(-reach, reach + 1):
                for b in range(-reach, reach + 1):
                    if 0 <= i + a < h and 0 <= j + b < w:
                        out[:, i, j] += weight[:, :, a + reach, b + reach] @ x[:, i + a, j + b]
    return out


def adaptive_pooling(
    levels: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], fusion: str
) -> Tensor:
    """PANet, section 3.2, for what was pooled from each level [C, h, w], with a convolution for each."""
    adapted = torch.stack([convolve(*parts).clamp(min=0) for parts in zip(levels, weights, biases)])
    return adapted.amax(0) if fusion == "max" else adapted.sum(0)


def soft_levels(levels: Sequence[Tensor], first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """AugFPN, section 3.3, for what was pooled from each level [C, h, w]; first and second: weight and bias."""
    logits = convolve(convolve(torch.cat(list(levels)), *first).clamp(min=0), *second)
    weights = 1 / (1 + (-logits).exp())
    return torch.stack([weights[level] * x for level, x in enumerate(levels)]).sum(0)


def context(
    feature: Tensor, box: Sequence[float], stride: float, around: Tensor, image: Tensor, scale: float, **settings: Any
) -> Tensor:
    """RoI Align of the box, plus `around` [D, C] times that of the enlarged box, plus `image` [D, C] times the mean."""
    x1, y1, x2, y2 = box
    x, y, half_width, half_height = (x1 + x2) / 2, (y1 + y2) / 2, scale * (x2 - x1) / 2, scale * (y2 - y1) / 2
    larger = (x - half_width, y - half_height, x + half_width, y + half_height)
    own, surroundings = (roi_align(feature, b, stride, **settings) for b in (box, larger))
    mean = feature.flatten(1).mean(1)
    return own + torch.einsum("dc,chw->dhw", around, surroundings) + (image @ mean)[:, None, None]


def border_align(feature: Tensor, box: Sequence[float], stride: float, points: int) -> Tensor:
    """BorderDet, equation 2: the maxima along left, top, right and bottom, [C, 4]. Feature: [4, C, H, W], for each."""
    x1, y1, x2, y2 = (c / stride - 0.5 for c in box)
    sides = []
    for side, (x, y, along_x, along_y) in enumerate(
        [(x1, y1, 0, y2 - y1), (x1, y1, x2 - x1, 0), (x2, y1, 0, y2 - y1), (x1, y2, x2 - x1, 0)]
    ):
        values = [
            bilinear(feature[side], y + k * along_y / points, x + k * along_x / points)
            if all(map(isfinite, box))
            else feature.new_zeros(feature.shape[1])
            for k in range(points)
        ]
        sides.append(torch.stack(values).amax(0))
    return torch.stack(sides, 1)


def deformable_attention(
    values: Sequence[Tensor],
    box: Sequence[float],
    strides: Sequence[float],
    offsets: Tensor,
    weights: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """Deformable DETR, equation 3, before the last layer: values L x [M, D, H, W], the maps of each head; [M, D, h, w].

    offsets: [h * w, M, L, K, 2] (x, y). weights: [h * w, M, L, K].
    """
    (h, w), (_, heads, levels, points) = size, weights.shape
    out = values[0].new_zeros(heads, values[0].shape[1], h, w)
    if not all(map(isfinite, box)):
        return out
    for q in range(h * w):
        for m in range(heads):
            for level in range(levels):
                x1, y1, x2, y2 = (c / strides[level] for c in box)
                width, height = (x2 - x1) / w, (y2 - y1) / h
                for k in range(points):
                    dx, dy = offsets[q, m, level, k].tolist()
                    x = x1 + (q % w + 0.5 + 0.5 * dx / points) * width - 0.5
                    y = y1 + (q // w + 0.5 + 0.5 * dy / points) * height - 0.5
                    out[m, :, q // w, q % w] += weights[q, m, level, k] * bilinear(values[level][m], y, x)
    return out


def semantic_grid(box: Sequence[float], samples: int) -> tuple[int, int]:
    """Rows and columns of Semantic RoI Align's sampler: their product at most `samples`, their ratio the box's."""
    width, height = abs(box[2] - box[0]), abs(box[3] - box[1])
    if not all(map(isfinite, box)) or width == height == 0:
        ratio = 1.0
    else:
        ratio = height / width if width else float("inf")
    rows = samples if ratio == float("inf") else min(max(round(sqrt(samples * ratio)), 1), samples)
    return rows, samples // rows


def semantic_roi_align(
    feature: Tensor,
    box: Sequence[float],
    stride: float,
    embed: Callable[[Tensor], Tensor],
    attend: Callable[[Tensor, Tensor], Tensor],
    size: tuple[int, int],
    samples: int,
) -> Tensor:
    """Semantic RoI Align: `embed` makes of an area [4] what is added to a feature [C], `attend` of that and of the mean
    feature the logits [h * w] of a point."""
    rows, columns = semantic_grid(box, samples)
    x1, y1, x2, y2 = (c / stride for c in box)
    values, areas = [], []
    for i in range(rows):
        for j in range(columns):
            x, y = x1 + (j + 0.5) * (x2 - x1) / columns - 0.5, y1 + (i + 0.5) * (y2 - y1) / rows - 0.5
            values.append(bilinear(feature, y, x))
            areas.append(feature.new_tensor([j / columns, i / rows, (j + 1) / columns, (i + 1) / rows]))
    mean = torch.stack(values).mean(0)
    values = [value + embed(area) for value, area in zip(values, areas)]
    shares = torch.stack([attend(value, mean) for value in values]).exp()  # [P, h * w]
    shares = shares / shares.sum(0)
    return torch.stack([share * value[:, None] for share, value in zip(shares, values)]).sum(0).view(-1, *size)


def roi_align_rotated(
    feature: Tensor, box: Sequence[float], stride: float, size: tuple[int, int], sampling_ratio: int = 2
) -> Tensor:
    """RoI Align of (cx, cy, width, height, angle): its points about the centre, turned by the angle, x towards y."""
    h, w = size
    cx, cy, width, height = (c / stride for c in box[:4])
    out = feature.new_zeros(feature.shape[0], h, w)
    if not all(map(isfinite, box)):
        return out
    for i in range(h):
        for j in range(w):
            for n in range(sampling_ratio):
                for m in range(sampling_ratio):
                    x = ((j + (m + 0.5) / sampling_ratio) / w - 0.5) * width
                    y = ((i + (n + 0.5) / sampling_ratio) / h - 0.5) * height
                    turned_x = cx + x * cos(box[4]) - y * sin(box[4]) - 0.5
                    turned_y = cy + x * sin(box[4]) + y * cos(box[4]) - 0.5
                    out[:, i, j] += bilinear(feature, turned_y, turned_x) / sampling_ratio**2
    return out
