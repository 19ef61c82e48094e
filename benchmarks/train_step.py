"""One training step of Mask R-CNN R50-FPN against torchvision's: the same weights, images, objects and numbers of RoIs.

    python benchmarks/train_step.py                                  two images of 480 x 640 on the CPU
    python benchmarks/train_step.py --device cuda --batch 8 --size 800 1333 --dtype bf16

A step is forward, backward and the optimiser's update. The two take turns, each in a process of its own with the
settings that its users have. The losses of the first step are compared too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.peers import mask_rcnn_pair, synthetic_batch
from detector.engine.distributed import keep_freed_memory
from detector.layers import to_liked_layout

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(name: str, args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """One contender's step: forward, backward, update; it returns the losses."""
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    ours, theirs = mask_rcnn_pair(args.device, args.size)
    data = synthetic_batch(args.batch, args.size, args.objects, args.device)
    if name == "ours":  # as the training loop has it
        if device.type == "cpu":
            keep_freed_memory()
        model, inputs = to_liked_layout(ours, device), (data.batch, data.targets)
    else:
        model, inputs = theirs, (data.images, data.their_targets)
    del ours, theirs
    model.train()
    # A learning rate of nearly nothing: the weights stay equal over the turns.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-9, momentum=0.9)

    def step() -> dict[str, float]:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            losses = model(*inputs)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        return {name: loss.item() for name, loss in losses.items()}

    return step


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    options.add_argument("--objects", type=int, default=10, help="objects of each image")
    options.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = options.parse_args()
    builders = {name: partial(build, name, args) for name in ("ours", "torchvision")}
    seconds, first, memory = harness.apart(builders, args.repeats, args.device)
    figures = harness.summary(seconds, reference="torchvision")
    for name, row in figures.items():
        row["images_per_s"] = round(1000 * args.batch / row["median_ms"], 3)
        row["peak_mib"] = round(memory[name])
    print(
        harness.table(
            ["", "median ms", "images/s", "speed-up", "peak MiB"],
            [[n, f["median_ms"], f["images_per_s"], f["speedup"], f["peak_mib"]] for n, f in figures.items()],
        )
    )
    print(
        "\nlosses: " + ", ".join(f"{k} {first['ours'][k]:.4f} / {first['torchvision'][k]:.4f}" for k in first["ours"])
    )
    setting = {"batch": args.batch, "size": list(args.size), "objects": args.objects, "dtype": args.dtype}
    harness.save(args.json, args.device, setting=setting, step=figures, losses=first)


if __name__ == "__main__":
    main()
