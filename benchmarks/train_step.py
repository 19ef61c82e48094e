"""One training step of Mask R-CNN R50-FPN against torchvision's: the same weights, images, objects and numbers of RoIs.

    python benchmarks/train_step.py                                  two images of 480 x 640 on the CPU
    python benchmarks/train_step.py --dtype bf16 --contenders ours torchvision torchvision_fp32
    python benchmarks/train_step.py --device cuda --batch 8 --size 800 1333 --dtype bf16
    python benchmarks/train_step.py --device cuda --batch 16 --size 1024 1024 --dtype bf16 \\
        --contenders ours compiled graphs torchvision                fixed sizes, as large-scale jitter makes them
    python benchmarks/train_step.py --contenders ours ours_as_mmdetection mmdetection torchvision

A step is forward, backward and the optimiser's update. The contenders take turns, each in a process of its own with the
settings that its users have: `compiled` is ours with runtime.compile=true, `graphs` the same parts as CUDA graphs,
`torchvision_fp32` what torchvision does by itself, whatever the dtype. The losses of the first step are compared too.
`mmdetection` is its Mask R-CNN by its own config (peers.py says how to install it), in bf16 `mmdetection_fp32`, because
its operators refuse bf16; `ours_as_mmdetection` is ours with its settings: adaptive RoI Align, 1000 proposals an image,
L1 for boxes.
"of peak" is the share of the rate that a large matrix product reaches on this machine in the same dtype, for the
operations of the step's convolutions and matrix products.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.peers import MMDetection, mask_rcnn_pair, mmdetection_data, require_mmdetection, synthetic_batch
from detector.ops.layers import to_preferred_layout
from detector.runtime import keep_freed_memory
from detector.threads import share_cores

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


OURS = ("ours", "compiled", "graphs", "ours_as_mmdetection")
CONTENDERS = (*OURS, "torchvision", "torchvision_fp32", "mmdetection", "mmdetection_fp32")


def dtype_of(name: str, args: argparse.Namespace) -> torch.dtype | None:
    """Of a contender's autocast; None: it has none."""
    return DTYPES["fp32" if name.endswith("fp32") else args.dtype]


def build(name: str, args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """One contender's step: forward, backward, update; it returns the losses, and its operations in the first turn."""
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), dtype_of(name, args)
    settings = "mmdet" if name == "ours_as_mmdetection" else "torchvision"
    ours, theirs = mask_rcnn_pair(args.device, args.size, settings=settings)
    data = synthetic_batch(args.batch, args.size, args.objects, args.device)
    if name.startswith("torchvision"):
        model, inputs = theirs, (data.images, data.their_targets)
    elif name.startswith("mmdetection"):
        model, inputs = MMDetection(ours).to(device), (mmdetection_data(data),)
    else:  # as the training loop has it
        if device.type == "cpu":
            keep_freed_memory()
            share_cores()
        model, inputs = to_preferred_layout(ours, device), (data.batch, data.targets)
        if name in ("compiled", "graphs"):
            for part in (model.backbone, model.neck, model.rpn.head):
                part.compile(mode="reduce-overhead" if name == "graphs" else None)
    del ours, theirs
    model.train()
    # A learning rate of nearly nothing: the weights stay equal over the turns.
    learnt = [p for p in model.parameters() if p.requires_grad]
    # as train.py builds it, and as torchvision's reference and mmdetection's configs do
    optimizer = torch.optim.SGD(learnt, lr=1e-9, momentum=0.9, fused=name in OURS)

    def step() -> dict[str, float]:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            losses = model(*inputs)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: loss.item() for name, loss in losses.items()}

    def first_step() -> dict[str, float]:
        if name in ("compiled", "graphs"):  # tracing does not go through the counter
            return step()
        with FlopCounterMode(display=False) as counter:
            return step() | {"flops": counter.get_total_flops()}

    def steps() -> dict[str, float]:
        return [step() for _ in range(args.steps)][-1]

    turns = iter([first_step])
    return lambda: next(turns, steps)()


def matmul_rate(
    device: str, dtype: torch.dtype | None, threads: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Operations per second of a large matrix product, the best of five, by a clock."""
    torch.set_num_threads(threads)
    size = 8192 if device.startswith("cuda") else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    wait, best = torch.cuda.synchronize if device.startswith("cuda") else lambda: None, float("inf")
    for _ in range(5):
        wait()
        start = clock()
        a @ a
        wait()
        best = min(best, clock() - start)
    return 2 * size**3 / best


def profiled(args: argparse.Namespace) -> str:
    """The operators of one of our steps by their own time, and all of it beside what the matrix peak would take.

    The time is that of the CPU's threads; on a GPU that of its kernels, with how long it stood idle.
    """
    step, cuda = build("ours", args), args.device.startswith("cuda")
    flops = step()["flops"]
    clock = time.perf_counter if cuda else partial(time.clock_gettime, time.CLOCK_PROCESS_CPUTIME_ID)
    step()
    start = clock()
    step()
    seconds = clock() - start
    floor = flops / matmul_rate(args.device, DTYPES[args.dtype], args.threads, clock)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *[activity.CUDA] * cuda]) as found:
        step()
    time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(found.key_averages(), key=lambda row: -getattr(row, time_of))
    if cuda:  # an operator's time is that of its kernels, which are listed too
        rows = [row for row in rows if row.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(getattr(row, time_of) for row in rows)
    lines = [[row.key[:100], row.count, round(100 * getattr(row, time_of) / total, 1)] for row in rows[:40]]
    text = f"a step takes {seconds:.3f} s, its {flops / 1e9:.0f} G operations {floor:.3f} s at the matrix peak"
    if cuda:
        launches = sum(row.count for row in rows)
        text += f"; {launches} kernels and copies take {total / 1e6:.3f} s of it"
    return f"{harness.table(['', 'calls', '% of the time'], lines)}\n\n{text}"


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    options.add_argument("--objects", type=int, default=10, help="objects of each image")
    options.add_argument("--dtype", choices=DTYPES, default="fp32")
    options.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["ours", "torchvision"])
    options.add_argument("--steps", type=int, default=1, help="of a turn: a GPU that stood idle takes the first slowly")
    options.add_argument("--profile", action="store_true", help="the operators of one of our steps instead")
    args = options.parse_args()
    if args.profile:
        print(profiled(args))
        return
    if any(name.startswith("mmdetection") for name in args.contenders):
        require_mmdetection()
    if "mmdetection" in args.contenders and args.dtype != "fp32":
        options.error("mmdetection's operators refuse bf16: take mmdetection_fp32")
    peak = matmul_rate(args.device, DTYPES[args.dtype], args.threads)
    builders = {name: partial(build, name, args) for name in args.contenders}
    seconds, results, memory = harness.apart(builders, args.repeats, args.device)
    seconds = {name: [taken / args.steps for taken in of_turns] for name, of_turns in seconds.items()}
    first = {name: each[0] for name, each in results.items()}
    figures = harness.summary(seconds, reference=args.contenders[-1])
    flops = {name: losses.pop("flops", None) for name, losses in first.items()}
    for name, row in figures.items():
        row["images_per_s"] = round(1000 * args.batch / row["median_ms"], 3)
        row["peak_mib"] = round(memory[name])
        done = flops[name] or flops.get("ours")
        alike = done and not name.endswith("_fp32")
        row["of_peak"] = round(1000 * done / row["median_ms"] / peak, 3) if alike else None
    columns = ("median_ms", "images_per_s", "speedup", "peak_mib", "of_peak")
    header = ["", "median ms", "images/s", "speed-up", "peak MiB", "of peak"]
    print(harness.table(header, [[name, *(row[c] for c in columns)] for name, row in figures.items()]))
    print()
    for name, losses in first.items():
        print(f"losses of {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in losses.items()))
    setting = {name: getattr(args, name) for name in ("batch", "size", "objects", "dtype", "steps")}
    harness.save(
        args.json, args.device, setting=setting, matmul_tflops=round(peak / 1e12, 3), step=figures, losses=first
    )


if __name__ == "__main__":
    main()
