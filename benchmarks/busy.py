"""Training steps of the quickstart beside other work: what is left of the quiet machine's speed, by how threads wait.

    python benchmarks/busy.py --json benchmarks/results/busy_cpu.json

Each contender is a process with all cores; they take turns. `ours` waits as train.py does, `openmp` as OpenMP does by
itself, `passive` is always asleep where it waits (OMP_WAIT_POLICY), `torchvision` is its Mask R-CNN with a ResNet-18 on
the same images, waiting as OpenMP does. Beside them run: nothing; one process that never rests, or two; a training job
with as many threads as there are cores, which wait as OpenMP does by itself.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks import harness
from benchmarks.peers import synthetic_batch
from detector.config import build, compose
from detector.ops.layers import to_preferred_layout
from detector.runtime import keep_freed_memory
from detector.threads import CHOSEN, share_cores

SIZE, CLASSES = (128, 128), 5
BESIDE = ["quiet", "one", "two", "job"]


def quickstart(args: argparse.Namespace, steps: int, watched: bool = False) -> Callable[[], None]:
    """Some steps of the quickstart's model on images of its size."""
    torch.set_num_threads(args.threads)
    if watched:
        share_cores()
    keep_freed_memory()
    cfg = compose("train", ["experiment=quickstart", "data.root=none"])
    model = to_preferred_layout(build(cfg.model, "model", num_classes=CLASSES), torch.device("cpu")).train()
    data = synthetic_batch(args.batch, SIZE, 6, "cpu")
    data.targets.labels.remainder_(CLASSES).add_(1)
    return partial(train, model, (data.batch, data.targets), steps)


def torchvisions(args: argparse.Namespace, steps: int) -> Callable[[], None]:
    torch.set_num_threads(args.threads)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    sizes = {"min_size": SIZE[0], "max_size": SIZE[1]}
    model = MaskRCNN(backbone, CLASSES + 1, **sizes, box_batch_size_per_image=64, rpn_post_nms_top_n_train=300).train()
    data = synthetic_batch(args.batch, SIZE, 6, "cpu")
    for target in data.their_targets:
        target["labels"].remainder_(CLASSES).add_(1)
    return partial(train, model, (data.images, data.their_targets), steps)


def train(model: torch.nn.Module, inputs: tuple, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    for _ in range(steps):
        sum(model(*inputs).values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def never_rest() -> None:
    while True:
        pass


def train_on(args: argparse.Namespace) -> None:
    work = quickstart(args, 1)
    while True:
        work()


def main() -> None:
    options = harness.parser(__doc__, repeats=7)
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--steps", type=int, default=4, help="steps of a turn")
    names = ["ours", "openmp", "passive", "torchvision"]
    options.add_argument("--contenders", nargs="+", choices=names, default=names)
    options.add_argument("--beside", nargs="+", choices=BESIDE, default=BESIDE, help="the first one counts as 100 %%")
    args = options.parse_args()
    ours = partial(quickstart, args, args.steps)
    contenders = {
        "ours": (partial(ours, watched=True), {}),
        "openmp": (ours, {}),
        "passive": (ours, {"OMP_WAIT_POLICY": "PASSIVE"}),
        "torchvision": (partial(torchvisions, args, 1), {}),
    }
    contenders = {name: contenders[name] for name in args.contenders}
    beside = {
        "quiet": [],
        "one": [never_rest],
        "two": [never_rest] * 2,
        "job": [partial(train_on, args)],
    }
    if given := [name for name in CHOSEN if name in os.environ]:
        raise SystemExit(f"{', '.join(given)}: unset, or all contenders wait in that way")
    turn = dict.fromkeys(contenders, args.steps) | {"torchvision": 1}
    context, figures = multiprocessing.get_context("spawn"), {}
    for name in args.beside:
        running = [context.Process(target=work, daemon=True) for work in beside[name]]
        for process in running:
            process.start()
        builders, environments = ({key: value[i] for key, value in contenders.items()} for i in (0, 1))
        seconds, _, _ = harness.apart(builders, args.repeats, environments=environments)
        for process in running:
            process.kill()
            process.join()
        figures[name] = {key: args.batch * turn[key] / statistics.median(values) for key, values in seconds.items()}
        print(name, {key: round(value, 2) for key, value in figures[name].items()}, flush=True)
    quiet = figures[args.beside[0]]
    rows = [
        [name, *(f"{row[key]:.1f} ({row[key] / quiet[key]:.0%})" for key in contenders)]
        for name, row in figures.items()
    ]
    print(harness.table(["images/s beside", *contenders], rows))
    harness.save(args.json, "cpu", environments=environments, images_per_s=figures)


if __name__ == "__main__":
    main()
