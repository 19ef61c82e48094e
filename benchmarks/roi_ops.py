"""Time and memory of the RoI methods, forward and backward, against torchvision's ops.

    python benchmarks/roi_ops.py                                    every method and case
    python benchmarks/roi_ops.py --methods align --sizes 7 --rois 512 --device cuda --dtype bfloat16
    python benchmarks/roi_ops.py --json benchmarks/results/roi_ops_cpu.json

One map is [2, 256, 200, 272]; the pyramid is P2-P5 of an 800 x 1088 image. Deformable pooling stands against one
written with F.grid_sample, and methods that no other library has against our own RoI Align. Ours reads channels_last
maps, the other the layout in which it is faster here. The runs alternate; the table has medians, and the ratio is
theirs to ours. Memory is what forward and backward add at their peak. On a GPU the share of the card's measured copy
bandwidth counts maps, RoI features and the gradients of both once each, a lower bound on the bytes moved. Rows of an
existing JSON file stay where this run does not measure them again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torchvision import ops

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from detector.roi import (
    AdaptivePooling,
    BorderAlign,
    ContextRoIPool,
    DeformableAttentionPool,
    DeformableRoIPool,
    LightHeadRoIAlign,
    PositionSensitiveRoIAlign,
    PreciseRoIPool,
    RoIAlign,
    RoIOp,
    RoIPool,
    RotatedRoIAlign,
    SemanticRoIAlign,
    SoftLevels,
    assign_levels,
    make_op,
)

CHANNELS, IMAGE = 256, (800, 1088)
STRIDES = {"one": (4,), "pyramid": (4, 8, 16, 32)}
BESIDE_ALIGN = {  # with their layers
    "adaptive_pooling": AdaptivePooling,
    "align_bicubic": partial(RoIAlign, kernel="bicubic"),
    "align_lanczos": partial(RoIAlign, kernel="lanczos"),
    "align_per_size": partial(RoIAlign, sampling_ratio=[[0, 4], [64, 2], [256, 1]]),
    "attention": DeformableAttentionPool,
    "border": BorderAlign,
    "context": ContextRoIPool,
    "light_head": LightHeadRoIAlign,
    "position_sensitive_layer": partial(PositionSensitiveRoIAlign, out_channels=10),
    "rotated": RotatedRoIAlign,
    "semantic": SemanticRoIAlign,
    "soft_levels": SoftLevels,
}
METHODS = ("align", "align_adaptive", "deformable", "pool", "precise", "position_sensitive", *BESIDE_ALIGN)


def make_rois(count: int, maps: str, images: int) -> Tensor:
    """RoIs [count, 5] of all sizes and mild aspect ratios; on one map, of the 56 to 112 px that FPN gives to P2."""
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(count, 4, generator=generator)
    low, high = (16, 600) if maps == "pyramid" else (56, 112)
    side, aspect = low * (high / low) ** u[:, 0], 2 ** (u[:, 1] - 0.5)
    w, h = side * aspect, side / aspect
    x, y = u[:, 2] * (IMAGE[1] - w), u[:, 3] * (IMAGE[0] - h)
    image = (torch.arange(count) * images // count).float()
    return torch.stack([image, x, y, (x + w).clamp(max=IMAGE[1]), (y + h).clamp(max=IMAGE[0])], 1)


def per_level(features: list[Tensor], rois: Tensor, levels: Tensor, size: int, op: Callable) -> Tensor:
    """torchvision's way over a pyramid: one call per level, results written to their rows."""
    if len(features) == 1:
        return op(features[0], rois, 0)
    out = None
    for level, feature in enumerate(features):
        at = (levels == level).nonzero()[:, 0]
        part = op(feature, rois[at], level)
        out = part.new_zeros(len(rois), part.shape[1], size, size) if out is None else out
        out[at] = part
    return out


def grid_sample_deformable(feature: Tensor, rois: Tensor, offsets: Tensor, stride: int, size: int) -> Tensor:
    """Deformable RoI pooling, 2 x 2 points per bin, gamma 0.1, as one would write it with F.grid_sample."""
    _, _, height, width = feature.shape
    x1, y1, x2, y2 = (rois[:, 1:] / stride).unbind(1)
    steps = (torch.arange(2 * size, device=rois.device) + 0.5) / (2 * size)
    shift = 0.1 * offsets.repeat_interleave(2, 2).repeat_interleave(2, 3)  # [R, 2, 2k, 2k]
    x = (x1[:, None, None] + (steps[None, None] + shift[:, 0]) * (x2 - x1)[:, None, None]) * 2 / width - 1
    y = (y1[:, None, None] + (steps[None, :, None] + shift[:, 1]) * (y2 - y1)[:, None, None]) * 2 / height - 1
    grid = torch.stack([x, y], 3).to(feature.dtype)
    parts = []
    for image in range(len(feature)):
        own = grid[rois[:, 0] == image].flatten(0, 1)[None]  # [1, r * 2k, 2k, 2]
        points = F.grid_sample(feature[image : image + 1], own, padding_mode="border", align_corners=False)
        parts.append(points[0].unflatten(1, (-1, 2 * size)).transpose(0, 1))
    return F.avg_pool2d(torch.cat(parts), 2)


def beside_align(method: str, maps: str, size: int) -> RoIOp:
    return make_op(BESIDE_ALIGN[method], size, CHANNELS, len(STRIDES[maps]))


def candidates(method: str, maps: str, size: int, rois: Tensor, levels: Tensor, offsets: Tensor) -> dict[str, Callable]:
    """Functions from a list of maps to RoI features [R, C, size, size]: ours and, where there is one, another's."""
    strides = STRIDES[maps]

    def over(op: Callable) -> Callable:
        return lambda f: per_level(f, rois, assign_levels(rois[:, 1:], strides), size, op)

    def ours(op) -> Callable:
        return lambda f: op(f, rois, assign_levels(rois[:, 1:], strides), strides).features

    def scale(level: int) -> float:
        return 1 / strides[level]

    if method in ("align", "align_adaptive"):
        ratio = 2 if method == "align" else 0
        result = {"ours": ours(RoIAlign(size, ratio))}
        if maps == "one":
            result["torchvision"] = over(lambda f, r, i: ops.roi_align(f, r, size, scale(i), ratio or -1, True))
        else:
            pooler = ops.MultiScaleRoIAlign([str(i) for i in range(len(strides))], size, ratio or -1)
            count = int(rois[:, 0].max()) + 1
            boxes = [rois[rois[:, 0] == image, 1:] for image in range(count)]
            result["torchvision"] = lambda f: pooler({str(i): m for i, m in enumerate(f)}, boxes, [IMAGE] * count)
        return result
    if method == "deformable":
        op = DeformableRoIPool(size, CHANNELS, predictor_width=1)

        def grid_sample(f: list[Tensor]) -> Tensor:
            if maps == "one":
                return grid_sample_deformable(f[0], rois, offsets, strides[0], size)
            out = f[0].new_zeros(len(rois), CHANNELS, size, size)
            for level, feature in enumerate(f):
                at = (levels == level).nonzero()[:, 0]
                part = grid_sample_deformable(feature, rois[at], offsets[at], strides[level], size)
                out[at] = part.to(out.dtype)
            return out

        return {"ours": lambda f: op.pool(f, rois, levels, strides, offsets), "grid_sample": grid_sample}
    if method == "pool":
        return {"ours": ours(RoIPool(size)), "torchvision": over(lambda f, r, i: ops.roi_pool(f, r, size, scale(i)))}
    if method == "position_sensitive":
        op = PositionSensitiveRoIAlign(size)
        return {
            "ours": ours(op),
            "torchvision": over(lambda f, r, i: ops.ps_roi_align(f, r, size, scale(i), 2)),
        }
    if method in BESIDE_ALIGN:
        op = beside_align(method, maps, size).to(rois.device)
        align = RoIAlign(size)
        return {"ours": ours(op), "our align": ours(align)}
    return {"ours": ours(PreciseRoIPool(size))}


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of copying 1 GiB on the GPU: the best of ten."""
    source = torch.empty(1 << 28, device="cuda")
    target = torch.empty_like(source)
    best = min(harness.interleave({"copy": lambda: target.copy_(source)}, 10, "cuda")["copy"])
    return 2 * source.numel() * 4 / best


def measure(method: str, maps: str, count: int, size: int, args: argparse.Namespace) -> dict:
    dtype, device = getattr(torch, args.dtype), args.device
    images = 2 if maps == "one" else 1
    channels = 10 * size * size if method == "position_sensitive" else CHANNELS
    rois = make_rois(count, maps, images).to(device)
    levels = assign_levels(rois[:, 1:], STRIDES[maps])
    offsets = torch.randn(count, 2, size, size, device=device).mul_(0.5).requires_grad_()
    features = [
        torch.randn(images, channels, IMAGE[0] // s, IMAGE[1] // s, device=device, dtype=dtype) for s in STRIDES[maps]
    ]
    out_channels = channels // (size * size) if method == "position_sensitive" else channels
    grad = torch.randn(count, out_channels, size, size, device=device, dtype=dtype)

    def step(function: Callable, layout: torch.memory_format, autocast: bool = False) -> Callable[[], None]:
        leaves = [f.contiguous(memory_format=layout).requires_grad_() for f in features]
        few = {out_channels: grad.contiguous(memory_format=layout)}  # some methods give fewer channels than others

        def run() -> None:
            offsets.grad = None
            for leaf in leaves:
                leaf.grad = None
            with torch.autocast(device.partition(":")[0], dtype, enabled=autocast and dtype != torch.float32):
                out = function(leaves).to(dtype)
            if out.shape[1] not in few:
                few[out.shape[1]] = grad[:, : out.shape[1]].contiguous(memory_format=layout)
            out.backward(few[out.shape[1]])

        return run

    functions = candidates(method, maps, size, rois, levels, offsets)
    steps = {"ours": step(functions.pop("ours"), torch.channels_last)}
    for name, function in functions.items():  # in whichever layout it is faster
        if name == "our align":
            steps[name] = step(function, torch.channels_last)
            continue
        layouts = torch.contiguous_format, torch.channels_last
        tried = {str(layout): step(function, layout, autocast=True) for layout in layouts}  # theirs lack bfloat16
        best = {layout: min(times) for layout, times in harness.interleave(tried, 1, device).items()}
        steps[name] = tried[min(best, key=best.get)]
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = harness.interleave(steps, args.repeats, device, clock)
    idle = 0 if args.cpu_time else harness.peak_memory(lambda: None, device)
    row = {"method": method, "maps": maps, "rois": count, "size": size, "dtype": args.dtype}
    row |= harness.summary(seconds, reference="ours")
    for name, run in steps.items():
        row[name]["peak_mib"] = None if args.cpu_time else round(harness.peak_memory(run, device) - idle)
        row["against"], row["ratio"] = name, round(1 / row[name].pop("speedup"), 2)
    if device == "cuda":
        moved = 2 * (sum(f.numel() for f in features) + grad.numel()) * features[0].element_size()
        rate = moved / statistics.median(seconds["ours"])
        row["ours"]["share_of_copy_bandwidth"] = round(rate / args.copy_bandwidth, 3)
    return row


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--maps", nargs="+", default=("one", "pyramid"), choices=tuple(STRIDES))
    parser.add_argument("--rois", nargs="+", type=int, default=(512, 1000))
    parser.add_argument("--sizes", nargs="+", type=int, default=(7, 14))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the CPU's seconds, and no memory: on a machine that others use too",
    )
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    args.copy_bandwidth = copy_bandwidth() if args.device == "cuda" else None
    rows = []
    for case in product(args.methods, args.maps, args.rois, args.sizes):
        rows.append(measure(*case, args))
        print("measured", *case, "ratio", rows[-1]["ratio"], file=sys.stderr)
    header = ["", "maps", "RoIs", "size", "ours, ms", "other, ms", "ratio", "ours, MiB", "other, MiB", "against"]
    print(harness.table(header, [as_cells(row) for row in rows]))
    if args.device == "cuda":
        shares = [row["ours"]["share_of_copy_bandwidth"] for row in rows]
        print(f"share of {args.copy_bandwidth / 1e9:.0f} GB/s copy bandwidth: {min(shares):.0%} to {max(shares):.0%}")
    harness.save(args.json, args.device, torchvision=torchvision.__version__, rows=merged(args.json, rows))


def as_cells(row: dict) -> list:
    ours, other = row["ours"], row[row["against"]]
    ratio = row["ratio"] if other is not ours else "-"
    case = [row["method"], row["maps"], row["rois"], row["size"]]
    times = [ours["median_ms"], other["median_ms"] if other is not ours else "-", ratio]
    return [*case, *times, ours["peak_mib"], other["peak_mib"] if other is not ours else "-", row["against"]]


def merged(path: Path | None, rows: list[dict]) -> list[dict]:
    """The rows, after those of an earlier file that were not measured again."""
    key = itemgetter("method", "maps", "rois", "size", "dtype")
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path and path.exists() else []
    new = set(map(key, rows))
    return [row for row in earlier if key(row) not in new] + rows


if __name__ == "__main__":
    main()
