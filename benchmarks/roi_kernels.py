"""The Triton kernels by themselves on a GPU: forward and backward against torchvision's kernels, and bandwidth.

    python benchmarks/roi_kernels.py                    the pyramid P2-P5 of two 800 x 1088 images, 1000 RoIs
    python benchmarks/roi_kernels.py --tiles            also: which tile of a program is fastest on this GPU
    python benchmarks/roi_kernels.py --json benchmarks/results/roi_kernels_gpu.json

Ten launches are captured in a CUDA graph, so Python's share is left out; the graphs take turns and figures are medians.
torchvision gets contiguous float32 maps, its fastest input (it has no bfloat16), and the RoIs sorted by level. The
bandwidth counts the fewest bytes that could be moved: the cells that any RoI touches once and the RoI features once;
for the gradient the RoI features once and the gradient of all maps once. It is set against the GPU's measured copy.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.roi_ops import make_rois
from detector.roi import assign_levels, triton_align, triton_bag  # noqa: F401  they register their ops

STRIDES, IMAGE, IMAGES = (4, 8, 16, 32), (800, 1088), 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


LAUNCHES = 10


def captured(work: Callable) -> torch.cuda.CUDAGraph:
    """LAUNCHES times `work` as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(LAUNCHES):
            work()
    return graph


def milliseconds(contenders: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Median time of one launch of each contender on the device."""
    graphs = {name: captured(work) for name, work in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(repeats + 1):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) / LAUNCHES)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second, read plus written, of copying 2 GiB of random numbers on the device."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    return 8 * source.numel() / (milliseconds({"copy": lambda: target.copy_(source)}, repeats)["copy"] / 1000)


class Case:
    """Maps, RoIs and the kernels over them."""

    def __init__(self, rois: int, size: int, dtype: torch.dtype, channels: int = 256):
        shapes = [(IMAGES, channels, IMAGE[0] // s, IMAGE[1] // s) for s in STRIDES]
        self.features = [torch.randn(s, device="cuda").to(dtype, memory_format=torch.channels_last) for s in shapes]
        self.rois = make_rois(rois, "pyramid", IMAGES).cuda()
        self.levels = assign_levels(self.rois[:, 1:], STRIDES)
        self.shapes = [n for shape in shapes for n in shape]
        self.size, self.scales = size, [1 / s for s in STRIDES]
        self.offsets = 0.5 * torch.randn(rois, 2, size, size, device="cuda")
        self.grad = torch.randn(rois, channels, size, size, device="cuda").to(dtype, memory_format=torch.channels_last)

    def ours(self) -> dict[str, Callable]:
        def sampling(offsets: torch.Tensor | None) -> tuple:
            return self.rois, self.levels, offsets, None, self.scales, [self.size] * 2, 2, True, 0.1

        ops, plain, moved = torch.ops.detector, sampling(None), sampling(self.offsets)
        return {
            "align": lambda: ops.roi_align(self.features, *plain),
            "align gradient": lambda: ops.roi_align_features_gradient(self.grad, self.shapes, *plain),
            "deformable": lambda: ops.roi_align(self.features, *moved),
            "deformable gradient": lambda: ops.roi_align_features_gradient(self.grad, self.shapes, *moved),
            "offsets gradient": lambda: ops.roi_align_offsets_gradient(self.grad, self.features, *moved),
        }

    def torchvision(self) -> dict[str, Callable]:
        forward, backward = torch.ops.torchvision.roi_align, torch.ops.torchvision._roi_align_backward
        parts = []
        for level, feature in enumerate(self.features):
            rows = (self.levels == level).nonzero()[:, 0]
            grad = self.grad[rows].float().contiguous()
            parts.append((feature.float().contiguous(), self.rois[rows], self.scales[level], grad))
        k = self.size
        return {
            "align": lambda: [forward(f, r, s, k, k, 2, True) for f, r, s, _ in parts],
            "align gradient": lambda: [backward(g, r, s, k, k, *f.shape, 2, True) for f, r, s, g in parts],
        }

    def fewest_bytes(self) -> dict[str, int]:
        """What reading and writing everything once would move."""
        item, channels = self.grad.element_size(), self.grad.shape[1]
        cells = sum(f.numel() for f in self.features) // channels
        touched = int(self.ours()["align gradient"]().any(1).sum())
        bins = self.grad.numel()
        forward, backward = item * (touched * channels + bins), item * (cells * channels + bins)
        return {
            "align": forward,
            "align gradient": backward,
            "deformable": forward,
            "deformable gradient": backward,
            "offsets gradient": forward,
        }


def measure(case: Case, repeats: int, bandwidth: float) -> list[dict]:
    ours, theirs, fewest = case.ours(), case.torchvision(), case.fewest_bytes()
    rows = []
    for name, work in ours.items():
        contenders = {"ours": work} | ({"torchvision": theirs[name]} if name in theirs else {})
        times = milliseconds(contenders, repeats)
        row = {"kernel": name, "size": case.size, "dtype": str(case.grad.dtype).removeprefix("torch.")}
        row |= {f"{who}_ms": round(ms, 4) for who, ms in times.items()}
        row["share_of_copy_bandwidth"] = round(fewest[name] / (times["ours"] / 1000) / bandwidth, 3)
        if "torchvision" in times:
            row["ratio"] = round(times["torchvision"] / times["ours"], 2)
        rows.append(row)
    return rows


def try_tiles(case: Case, repeats: int) -> list[dict]:
    """Time of every kernel with other tiles: bins per program, and values per thread."""
    rows = []
    before = triton_bag.ROWS, triton_bag.VALUES
    for bins, values in ((1, 8), (2, 8), (4, 4), (4, 8), (4, 16), (8, 8), (8, 16), (16, 8)):
        triton_bag.ROWS, triton_bag.VALUES = bins, values
        times = milliseconds(case.ours(), repeats)
        rows.append({"bins": bins, "values": values, "size": case.size, **{k: round(v, 4) for k, v in times.items()}})
    triton_bag.ROWS, triton_bag.VALUES = before
    return rows


def main() -> None:
    options = harness.parser(__doc__, repeats=10)
    options.add_argument("--rois", type=int, default=1000)
    options.add_argument("--tiles", action="store_true", help="also try other tiles, in float32")
    args = options.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("roi_kernels.py needs a GPU; benchmarks/roi_ops.py measures the CPU")
    bandwidth = copy_bandwidth(args.repeats)
    rows, tiles = [], []
    for size, (_, dtype) in product((7, 14), DTYPES.items()):
        rows += measure(Case(args.rois, size, dtype), args.repeats, bandwidth)
    header = ["kernel", "size", "dtype", "ours_ms", "torchvision_ms", "ratio", "share_of_copy_bandwidth"]
    print(harness.table(header, [[row.get(h, "-") for h in header] for row in rows]))
    print(f"copy bandwidth: {bandwidth / 1e9:.0f} GB/s, read plus written")
    save = {"rois": args.rois, "copy_gb_per_s": round(bandwidth / 1e9), "rows": rows}
    harness.save(args.json, "cuda", **save)
    if args.tiles:
        for size in (7, 14):
            tiles += try_tiles(Case(args.rois, size, torch.float32), args.repeats)
        print(harness.table(list(tiles[0]), [list(row.values()) for row in tiles]))
        harness.save(args.json, "cuda", **save, tiles=tiles)


if __name__ == "__main__":
    main()
