"""RoI Align and deformable RoI pooling on the GPU: one kernel launch for the RoIs of all levels.

An output bin is a weighted sum of cells (Mask R-CNN's RoIAlign; Deformable ConvNets, equations 5 and 6):

    out[i, j] = m[i, j] * sum_y sum_x wy[i, j](y) * wx[i, j](x) * F[y, x]

where wy(y) is the mean, over the sampling rows p of the bin, of the bilinear kernel max(0, 1 - |y - p|). The kernels
walk over the cells that a bin touches, not over the four corners of every sampling point: neighbouring points share
cells (2 x 2 points in a bin of 2 x 2 cells touch 9, not 16), and adaptive sampling costs no more than fixed. The maps
are read channels_last, where the C values of a cell are contiguous.

Dimensions: N images, L levels, R RoIs, C channels, h x w bins; the tile of one program is ROWS bins by CHANNELS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import avg_pool2d

from detector.roi.base import check_inputs
from detector.roi.triton_bag import Accumulator, grid, scatter, tile

# Adaptive sampling puts the points at most one and more than half a cell apart: at most four of them lie within one
# cell of a given cell; one more covers rounding.
REACH = tl.constexpr(5)
FAR = tl.constexpr(1e6)  # beyond any map, and safe to convert to int32


@triton.jit
def _pick(values, level):
    """values[level], for a tuple and a level known only at run time."""
    chosen = tl.where(level == 0, values[0], values[len(values) - 1])
    for i in tl.static_range(1, len(values) - 1):
        chosen = tl.where(level == i, values[i], chosen)
    return chosen


@triton.jit
def _sampling(start, extent, bins, SAMPLES: tl.constexpr):
    """Bin size, sampling points per bin (SAMPLES, adaptive where 0) and the step between them, along one axis."""
    size = tl.div_rn(extent, bins * 1.0)  # plain division is off by a bit, which can add a point
    if SAMPLES > 0:
        points = SAMPLES
    else:
        points = tl.ceil(tl.minimum(tl.maximum(size, 0.0), FAR)).to(tl.int32)
    points = tl.where(start + extent < float("inf"), points, 0)  # NaN and infinite RoIs read nothing
    return size, points, size / tl.maximum(points, 1)


@triton.jit
def _walk(axis):
    """The first cell [ROWS] that the points touch along an axis, and the number of cells to walk over from there."""
    cells, start, step, points = axis
    span = step * (points - 1)
    low = start + 0.5 * step + tl.minimum(span, 0.0)
    first = tl.floor(tl.minimum(tl.maximum(low, 0.0), cells - 1.0)).to(tl.int32)
    count = tl.minimum(tl.minimum(tl.abs(span), FAR).to(tl.int32) + 3, cells)
    return first, tl.where(points > 0, count, 0)


@triton.jit
def _weight(cell, axis, SAMPLES: tl.constexpr):
    """Weight [ROWS] of a cell, summed over the points start + (p + 1/2) step, and its derivative by `start`.

    A point up to one cell beyond the outermost cells reads the edge value; further out, and at NaN, it reads 0. Points
    are clamped into the map, so a cell outside of it has weight 0 and is never read.
    """
    cells, start, step, points = axis
    weight = tl.zeros_like(start)
    slope = tl.zeros_like(start)
    if SAMPLES > 0:
        first = tl.zeros_like(cell)
    else:
        first = tl.ceil(tl.minimum(tl.maximum((cell - 1 - start) / step - 0.5, 0.0), FAR)).to(tl.int32)
    for i in tl.static_range(SAMPLES if SAMPLES > 0 else REACH):
        position = start + (first + i + 0.5) * step
        read = (first + i < points) & (position >= -1) & (position <= cells)
        inner = read & (position >= 0) & (position < cells - 1)
        position = tl.minimum(tl.maximum(position, 0.0), cells - 1.0)
        distance = cell - tl.where(read, position, FAR)
        weight += tl.maximum(1 - tl.abs(distance), 0.0)
        right = (distance > 0) & (distance <= 1)
        left = (distance > -1) & (distance <= 0)
        slope += tl.where(inner & right, 1.0, 0.0) - tl.where(inner & left, 1.0, 0.0)
    return weight, slope


@triton.jit
def _bins(
    rois, levels, offsets, images, heights, widths, scales, gamma, bins_h, bins_w,
    SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The bins [ROWS] of this program: where they lie and how their points are spread along y and x.

    Whatever `rois` and `levels` hold, the level and the image are ones that exist.
    """
    bins = bins_h * bins_w
    tiles = tl.cdiv(bins, ROWS)
    roi = (tl.program_id(0) // tiles).to(tl.int64)
    bin = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    live = bin < bins

    level = tl.minimum(tl.maximum(tl.load(levels + roi), 0), len(scales) - 1).to(tl.int32)
    image = tl.minimum(tl.maximum(tl.load(rois + roi * 5).to(tl.float32), 0.0), images - 1.0).to(tl.int32)
    height = _pick(heights, level).to(tl.int32)
    width = _pick(widths, level).to(tl.int32)
    scale = _pick(scales, level)
    shift = 0.5 if ALIGNED else 0.0
    x = tl.load(rois + roi * 5 + 1).to(tl.float32) * scale - shift
    y = tl.load(rois + roi * 5 + 2).to(tl.float32) * scale - shift
    extent_x = tl.load(rois + roi * 5 + 3).to(tl.float32) * scale - shift - x
    extent_y = tl.load(rois + roi * 5 + 4).to(tl.float32) * scale - shift - y
    if not ALIGNED:  # a comparison, for tl.maximum would drop NaN
        extent_x = tl.where(extent_x < 1, 1.0, extent_x)
        extent_y = tl.where(extent_y < 1, 1.0, extent_y)

    size_y, points_y, step_y = _sampling(y, extent_y, bins_h, SAMPLES)
    size_x, points_x, step_x = _sampling(x, extent_x, bins_w, SAMPLES)
    top = y + (bin // bins_w) * size_y
    left = x + (bin % bins_w) * size_x
    if offsets is not None:  # [R, 2, h, w] = (dx, dy), in units of the RoI's extent
        offset = offsets + roi * 2 * bins + bin
        left += gamma * extent_x * tl.load(offset, mask=live, other=0).to(tl.float32)
        top += gamma * extent_y * tl.load(offset + bins, mask=live, other=0).to(tl.float32)
    axis_y = height, top, step_y, points_y
    axis_x = width, left, step_x, points_x
    share = 1.0 / tl.maximum(points_y.to(tl.float32) * points_x, 1.0)  # of one point in the mean of its bin
    return roi, bin, live, level, image, axis_y, axis_x, share, extent_y, extent_x


@triton.jit
def _forward(
    features, heights, widths, scales, rois, levels, offsets, modulation, out, images, channels, bins_h, bins_w, gamma,
    SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    roi, bin, live, level, image, axis_y, axis_x, share, _, _ = _bins(
        rois, levels, offsets, images, heights, widths, scales, gamma, bins_h, bins_w, SAMPLES, ALIGNED, ROWS
    )
    height, width = axis_y[0], axis_x[0]
    place = roi * bins_h * bins_w + bin
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = live[:, None] & (channel < channels)[None, :]
    table = _pick(features, level) + image.to(tl.int64) * height * width * channels + channel[None, :]
    first_y, count_y = _walk(axis_y)
    first_x, count_x = _walk(axis_x)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for step_y in range(count_y):
        y = first_y + step_y
        weight_y = _weight(y, axis_y, SAMPLES)[0]
        for step_x in range(count_x):
            x = first_x + step_x
            weight_x = _weight(x, axis_x, SAMPLES)[0]
            weight = weight_y * weight_x
            rows = (y * width + x).to(tl.int64) * channels
            value = tl.load(table + rows[:, None], mask=inside & (weight != 0)[:, None], other=0)
            total += weight[:, None] * value.to(tl.float32)
    total *= share
    if modulation is not None:
        total *= tl.load(modulation + place, mask=live, other=0).to(tl.float32)[:, None]
    tl.store(out + (place * channels)[:, None] + channel[None, :], total, mask=inside)


@triton.jit
def _features_gradient(
    grad, sums, unit, heights, widths, scales, rois, levels, offsets, modulation, images, channels, bins_h, bins_w,
    gamma, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    FIXED_POINT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Spread the gradient of every bin over the cells that it read; `sums` is one table for the cells of all levels."""
    roi, bin, live, level, image, axis_y, axis_x, share, _, _ = _bins(
        rois, levels, offsets, images, heights, widths, scales, gamma, bins_h, bins_w, SAMPLES, ALIGNED, ROWS
    )
    height, width = axis_y[0], axis_x[0]
    place = roi * bins_h * bins_w + bin
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = live[:, None] & (channel < channels)[None, :]
    first_cell = image.to(tl.int64) * height * width
    for i in tl.static_range(len(scales)):
        before = tl.where(i < level, images, 0).to(tl.int64)
        first_cell += before * _pick(heights, i).to(tl.int32) * _pick(widths, i).to(tl.int32)
    table = sums + first_cell * channels + channel[None, :]
    value = tl.load(grad + (place * channels)[:, None] + channel[None, :], mask=inside, other=0).to(tl.float32) * share
    if modulation is not None:
        value *= tl.load(modulation + place, mask=live, other=0).to(tl.float32)[:, None]
    # Padding has a gradient of zeros, and all of it would meet in one cell.
    inside &= (tl.max((value != 0).to(tl.int32), axis=1) > 0)[:, None]
    first_y, count_y = _walk(axis_y)
    first_x, count_x = _walk(axis_x)
    for step_y in range(count_y):
        y = first_y + step_y
        weight_y = _weight(y, axis_y, SAMPLES)[0]
        for step_x in range(count_x):
            x = first_x + step_x
            weight_x = _weight(x, axis_x, SAMPLES)[0]
            weight = weight_y * weight_x
            rows = (y * width + x).to(tl.int64) * channels
            scatter(table + rows[:, None], weight[:, None] * value, inside & (weight != 0)[:, None], unit, FIXED_POINT)


@triton.jit
def _offsets_gradient(
    grad, features, heights, widths, scales, rois, levels, offsets, modulation, offsets_grad, modulation_grad,
    images, channels, bins_h, bins_w, gamma,
    SAMPLES: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """d out / d offset moves the sampling points: the derivative of the weights, scaled by gamma and the extent."""
    roi, bin, live, level, image, axis_y, axis_x, share, extent_y, extent_x = _bins(
        rois, levels, offsets, images, heights, widths, scales, gamma, bins_h, bins_w, SAMPLES, ALIGNED, ROWS
    )
    height, width = axis_y[0], axis_x[0]
    bins = bins_h * bins_w
    place = roi * bins + bin
    table = _pick(features, level) + image.to(tl.int64) * height * width * channels
    first_y, count_y = _walk(axis_y)
    first_x, count_x = _walk(axis_x)
    by_y = tl.zeros((ROWS,), tl.float32)
    by_x = tl.zeros((ROWS,), tl.float32)
    by_modulation = tl.zeros((ROWS,), tl.float32)
    for first_channel in range(0, channels, CHANNELS):
        channel = first_channel + tl.arange(0, CHANNELS)
        inside = live[:, None] & (channel < channels)[None, :]
        # The sums of cells with the derived weights; one reduction over the channels at the end, not one per cell.
        plain = tl.zeros((ROWS, CHANNELS), tl.float32)
        moved_y = tl.zeros((ROWS, CHANNELS), tl.float32)
        moved_x = tl.zeros((ROWS, CHANNELS), tl.float32)
        for step_y in range(count_y):
            y = first_y + step_y
            weight_y, slope_y = _weight(y, axis_y, SAMPLES)
            for step_x in range(count_x):
                x = first_x + step_x
                weight_x, slope_x = _weight(x, axis_x, SAMPLES)
                used = (
                    (y < height) & (x < width) & ((weight_y != 0) | (slope_y != 0)) & ((weight_x != 0) | (slope_x != 0))
                )
                rows = (y * width + x).to(tl.int64) * channels
                value = tl.load(table + rows[:, None] + channel[None, :], mask=inside & used[:, None], other=0)
                value = value.to(tl.float32)
                plain += (weight_y * weight_x)[:, None] * value
                moved_y += (slope_y * weight_x)[:, None] * value
                moved_x += (weight_y * slope_x)[:, None] * value
        value = tl.load(grad + (place * channels)[:, None] + channel[None, :], mask=inside, other=0).to(tl.float32)
        by_y += tl.sum(value * moved_y, axis=1)
        by_x += tl.sum(value * moved_x, axis=1)
        by_modulation += tl.sum(value * plain, axis=1)
    factor = share
    if modulation is not None:
        factor *= tl.load(modulation + place, mask=live, other=0).to(tl.float32)
        tl.store(modulation_grad + place, share * by_modulation, mask=live)
    if offsets is not None:
        offset = offsets_grad + roi * 2 * bins + bin
        read = axis_y[3] * axis_x[3] > 0  # RoIs that are not finite read nothing, and no number times 0 is NaN then
        tl.store(offset, tl.where(read, gamma * extent_x * factor * by_x, 0.0), mask=live)
        tl.store(offset + bins, tl.where(read, gamma * extent_y * factor * by_y, 0.0), mask=live)


# The arguments that all ops share, `sampling` below: what is read where, and how.
SAMPLING = (
    "Tensor rois, Tensor levels, Tensor? offsets, Tensor? modulation, float[] scales, SymInt[] bins, "
    "int sampling_ratio, bool aligned, float gamma"
)


def _launch(kernel, shapes: Sequence[Sequence[int]], sampling: tuple, channel_tiles: bool = True, **tensors) -> None:
    """Run a kernel over the bins of all RoIs, and over the channels unless the kernel loops over them itself.

    Map sizes travel as floats: Triton would compile a kernel anew for integers with other factors.
    """
    rois, levels, offsets, modulation, scales, (bins_h, bins_w), sampling_ratio, aligned, gamma = sampling
    images, channels = shapes[0][:2]
    tiles = len(rois) * grid(bins_h * bins_w, channels)[0], grid(1, channels)[1] if channel_tiles else 1
    kernel[tiles](
        heights=tuple(float(shape[2]) for shape in shapes),
        widths=tuple(float(shape[3]) for shape in shapes),
        scales=tuple(scales),
        rois=rois.contiguous(),
        levels=levels.contiguous(),
        offsets=None if offsets is None else offsets.contiguous(),
        modulation=None if modulation is None else modulation.contiguous(),
        images=images,
        channels=channels,
        bins_h=bins_h,
        bins_w=bins_w,
        gamma=gamma,
        SAMPLES=sampling_ratio,
        ALIGNED=aligned,
        **tensors,
        **tile(channels),
    )


def _cells_first(x: Tensor) -> Tensor:
    """[N, C, H, W] as contiguous [N, H, W, C]: a view if it is channels_last, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def _levels(shapes: Sequence[int]) -> list[Sequence[int]]:
    """[N, C, H, W] of every level, from one list."""
    return [shapes[i : i + 4] for i in range(0, len(shapes), 4)]


@torch.library.custom_op("detector::roi_align", mutates_args=(), schema=f"(Tensor[] features, {SAMPLING}) -> Tensor")
def _roi_align(features, *sampling):
    out = _empty_output(features, *sampling)
    if out.numel():
        shapes = [f.shape for f in features]
        _launch(_forward, shapes, sampling, features=tuple(_cells_first(f) for f in features), out=out)
    return out


@_roi_align.register_fake
def _empty_output(features, rois, levels, offsets, modulation, scales, bins, *_):
    first = features[0]
    shape = (rois.shape[0], first.shape[1], *bins)
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last)


@torch.library.custom_op(
    "detector::roi_align_features_gradient",
    mutates_args=(),
    schema=f"(Tensor grad, SymInt[] shapes, {SAMPLING}) -> Tensor",
)
def _roi_align_features_gradient(grad, shapes, *sampling):
    """The gradients of all levels as one table [cells, C]."""
    shapes, modulation = _levels(shapes), sampling[3]
    cells, channels = sum(n * h * w for n, _, h, w in shapes), shapes[0][1]
    if grad.numel() == 0:
        return grad.new_zeros(cells, channels)
    terms = grad.numel() // channels  # one per bin at most, for the weights of a bin sum up to 1
    total = Accumulator(cells, channels, terms, grad, modulation)
    _launch(
        _features_gradient, shapes, sampling,
        grad=_cells_first(grad), sums=total.sums, unit=total.scale, FIXED_POINT=total.fixed_point,
    )  # fmt: skip
    return total.result(grad.dtype)


@_roi_align_features_gradient.register_fake
def _(grad, shapes, *_):
    shapes = _levels(shapes)
    return grad.new_empty(sum(n * h * w for n, _, h, w in shapes), shapes[0][1])


@torch.library.custom_op(
    "detector::roi_align_offsets_gradient",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor[] features, {SAMPLING}) -> (Tensor, Tensor)",
)
def _roi_align_offsets_gradient(grad, features, *sampling):
    """Gradients of the offsets and of the modulation; without elements for the one that is None."""
    offsets_grad, modulation_grad = _empty_gradients(grad, features, *sampling)
    if grad.numel() == 0:
        return offsets_grad.zero_(), modulation_grad.zero_()
    _launch(
        _offsets_gradient, [f.shape for f in features], sampling, channel_tiles=False,
        grad=_cells_first(grad), features=tuple(_cells_first(f) for f in features),
        offsets_grad=offsets_grad, modulation_grad=modulation_grad,
    )  # fmt: skip
    return offsets_grad, modulation_grad


@_roi_align_offsets_gradient.register_fake
def _empty_gradients(grad, features, rois, levels, offsets, modulation, *_):
    return tuple(grad.new_empty(0) if x is None else x.new_empty(x.shape) for x in (offsets, modulation))


def _save(ctx, inputs, output):
    features, *sampling = inputs
    ctx.shapes = [size for f in features for size in f.shape]
    ctx.settings = sampling[4:]
    sampled = sampling[2] is not None or sampling[3] is not None  # only their gradients need the features
    ctx.save_for_backward(*sampling[:4], *(features if sampled else ()))


def _backward(ctx, grad):
    rois, levels, offsets, modulation, *features = ctx.saved_tensors
    sampling = rois, levels, offsets, modulation, *ctx.settings
    needs_features, _, _, needs_offsets, needs_modulation, *_ = ctx.needs_input_grad
    shapes = _levels(ctx.shapes)
    features_grad, offsets_grad, modulation_grad = [None] * len(shapes), None, None
    if any(needs_features):
        table = _roi_align_features_gradient(grad, ctx.shapes, *sampling)
        parts = table.split([n * h * w for n, _, h, w in shapes])
        features_grad = [part.view(n, h, w, c).permute(0, 3, 1, 2) for part, (n, c, h, w) in zip(parts, shapes)]
    if needs_offsets or needs_modulation:
        offsets_grad, modulation_grad = _roi_align_offsets_gradient(grad, features, *sampling)
    offsets_grad = offsets_grad if needs_offsets else None
    modulation_grad = modulation_grad if needs_modulation else None
    return features_grad, None, None, offsets_grad, modulation_grad, *(None for _ in ctx.settings)


_roi_align.register_autograd(_backward, setup_context=_save)


def roi_align_fused(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    strides: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int = 2,
    aligned: bool = True,
    offsets: Tensor | None = None,
    modulation: Tensor | None = None,
    gamma: float = 0.1,
) -> Tensor:
    """RoI Align (average), and with `offsets` deformable RoI pooling; differentiable in features, offsets, modulation.

    Args:
        features: L maps [N, C, Hl, Wl], float32, bfloat16 or float16; channels_last spares a copy.
        rois: [R, 5] = (batch_index, x1, y1, x2, y2) in image pixels. RoIs that are not finite pool 0.
        levels: [R] int64 or int32, the map that each RoI reads. A level or batch index out of range reads the nearest.
        strides: of the L maps in image pixels.
        output_size: bins (h, w).
        sampling_ratio: points per bin and axis; 0 takes one per cell, ceil(bin size).
        aligned: cell centres at half-integers (RoIAlignV2 of Detectron2).
        offsets: [R, 2, h, w] = (dx, dy) per bin, in units of gamma times the RoI's width and height; or
            [R, 2, h * sampling_ratio, w * sampling_ratio], one per sampling point.
        modulation: a factor per bin or point, [R, h, w] or [R, h * sampling_ratio, w * sampling_ratio].
    Returns: [R, C, h, w] in the dtype of the features, channels_last.
    Raises: TypeError, ValueError for other shapes, dtypes or devices.
    """
    check_inputs(features, rois, levels, strides)
    if features[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"features must be float32, bfloat16 or float16, got {features[0].dtype}")
    if features[0].shape[0] == 0 and len(rois):
        raise ValueError(f"features hold no image, but rois has {len(rois)} rows")
    h, w = output_size
    given = offsets if offsets is not None else modulation
    points = 1  # per bin and axis, where every point moves by itself
    if given is not None and sampling_ratio > 1 and given.shape[-2:] == (h * sampling_ratio, w * sampling_ratio):
        points, h, w, sampling_ratio = sampling_ratio, h * sampling_ratio, w * sampling_ratio, 1
    for name, tensor, shape in (
        ("offsets", offsets, (len(rois), 2, h, w)),
        ("modulation", modulation, (len(rois), h, w)),
    ):
        if tensor is not None and (tensor.shape != shape or tensor.device != rois.device):
            raise ValueError(
                f"{name} must be {list(shape)} on {rois.device}, got {list(tensor.shape)} on {tensor.device}"
            )
    scales = [1 / stride for stride in strides]
    rois = rois.detach()
    out = _roi_align(list(features), rois, levels, offsets, modulation, scales, [h, w], sampling_ratio, aligned, gamma)
    return avg_pool2d(out, points) if points > 1 else out
