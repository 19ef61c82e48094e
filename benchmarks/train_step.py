"""One training step of Mask R-CNN R50-FPN against torchvision's: the same weights, images, objects and numbers of RoIs.

    python benchmarks/train_step.py                                  two images of 480 x 640 on the CPU
    python benchmarks/train_step.py --device cuda --batch 8 --size 800 1333 --dtype bf16

A step is forward, backward and the optimiser's update. The losses of the first step are compared too.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.peers import mask_rcnn_pair, synthetic_batch
from detector.layers import likes_channels_last

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def step(losses_of, optimizer, device: str, dtype: torch.dtype | None) -> dict[str, float]:
    """Forward, backward, update; returns the losses."""
    with torch.autocast(device, dtype, enabled=dtype is not None):
        losses = losses_of()
    sum(losses.values()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return {name: loss.detach() for name, loss in losses.items()}


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--batch", type=int, default=2)
    options.add_argument("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    options.add_argument("--objects", type=int, default=10, help="objects of each image")
    options.add_argument("--dtype", choices=DTYPES, default="fp32")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    device = args.device.partition(":")[0]

    ours, theirs = mask_rcnn_pair(args.device, args.size)
    data = synthetic_batch(args.batch, args.size, args.objects, args.device)
    if likes_channels_last(torch.device(args.device)):
        ours = ours.to(memory_format=torch.channels_last)  # as the training loop does
    ours.train()
    theirs.train()
    losses_of = {
        "ours": lambda: ours(data.batch, data.targets),
        "torchvision": lambda: theirs(data.images, data.their_targets),
    }
    models = {"ours": ours, "torchvision": theirs}
    steps = {}
    for name, model in models.items():
        # A learning rate of nearly nothing: the weights stay equal over the turns.
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-9, momentum=0.9)
        steps[name] = partial(step, losses_of[name], optimizer, device, DTYPES[args.dtype])

    first = {name: {k: float(v) for k, v in work().items()} for name, work in steps.items()}
    memory = {name: harness.peak_memory(work, args.device) for name, work in steps.items()}
    seconds = harness.interleave(steps, args.repeats, args.device)
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
