"""What activation checkpointing of the backbone saves in memory, and what it costs in time: a training step each.

    python benchmarks/checkpointing.py                               two images of 480 x 640 on the CPU
    python benchmarks/checkpointing.py --device cuda --batch 8 --size 800 1344

Mask R-CNN on each backbone of `--bodies`, with and without `model.backbone.checkpointing=true` by turns, each in a
process of its own; `--part body` goes no further than backbone and neck, whose memory grows with the images, unlike
that of the heads. Memory is what a step needs beyond what was in use before it, weights and optimiser not counted; time
is the processor's on a CPU, so that others at work on the machine count less, and the clock's on a GPU; the ratio of
times is the median of those of neighbouring turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.peers import synthetic_batch
from detector.config import build as build_part
from detector.config import compose
from detector.engine.journal import forget_peak, memory_mb
from detector.ops.layers import to_preferred_layout

BODIES = {
    "resnet50": ["backbone@model.backbone=resnet50", "model.backbone.frozen_stages=0"],
    "resnet50_bn": ["backbone@model.backbone=resnet50_bn", "model.backbone.frozen_stages=0"],
    "convnext_tiny": ["backbone@model.backbone=convnext_tiny"],
    "vit_small": [
        *("backbone@model.backbone=vit", "neck@model.neck=simple_pyramid"),
        "model.backbone.name=vit_small_patch16_224",
    ],
}


def build(body: str, held: bool, args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """A step of Mask R-CNN on that backbone: seconds and MiB."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    cfg = compose("train", ["experiment=none", *BODIES[body], f"model.backbone.checkpointing={held}"])
    torch.manual_seed(0)
    model = to_preferred_layout(build_part(cfg.model, "model", num_classes=80).to(device), device).train()
    data = synthetic_batch(args.batch, args.size, 10, args.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def step() -> dict[str, float]:
        model.zero_grad(set_to_none=False)
        forget_peak(device)
        before, start = memory_mb(device), clock()
        if args.part == "body":
            sum(level.square().mean() for level in model.features(data.batch)).backward()
        else:
            sum(model(data.batch, data.targets).values()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"seconds": clock() - start, "mib": memory_mb(device) - before}

    return step  # the first one makes the gradients, and is not counted


def main() -> None:
    options = harness.parser(__doc__, repeats=3)
    options.add_argument("--bodies", nargs="+", choices=BODIES, default=[*BODIES])
    options.add_argument("--part", choices=("body", "model"), default="body")
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    args = options.parse_args()
    figures: dict[str, dict[str, float]] = {}
    for body in args.bodies:
        builders = {str(held): partial(build, body, held, args) for held in (False, True)}
        _, results, _ = harness.apart(builders, args.repeats, args.device)
        without, held = (results[key][1:] for key in builders)
        row = figures[body] = {}
        for name, steps in (("without", without), ("with", held)):
            row[f"{name}_mib"] = round(
                max(step["mib"] for step in steps)
            )  # later ones find memory that earlier ones left
            row[f"{name}_s"] = round(statistics.median(step["seconds"] for step in steps), 3)
        row["memory"] = round(row["with_mib"] / row["without_mib"], 3)
        row["time"] = round(statistics.median(b["seconds"] / a["seconds"] for a, b in zip(without, held)), 3)
    columns = ("without_mib", "with_mib", "memory", "without_s", "with_s", "time")
    print(harness.table(["", *columns], [[name, *(row[c] for c in columns)] for name, row in figures.items()]))
    harness.save(
        args.json, args.device, setting={"part": args.part, "batch": args.batch, "size": list(args.size)}, step=figures
    )


if __name__ == "__main__":
    main()
