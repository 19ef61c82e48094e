"""The quickstart beside other work: what is left of the quiet machine's speed, by how threads wait.

    python benchmarks/busy.py --json benchmarks/results/busy_cpu.json
    python benchmarks/busy.py --dtype bf16 --contenders ours fewer openmp
    python benchmarks/busy.py --work predict
    python benchmarks/busy.py --work ranks --contenders ours torchvision

`--work`: training steps with all cores, detections of batches with all cores (prediction, and the larger part of an
evaluation), or training steps of two ranks with a thread each, whose gradients gloo sums.

Each contender is a process; they take turns. `ours` waits as train.py does, `fewer` has runtime.threads=auto, fewer
threads where others use the machine, `openmp` waits as OpenMP does by itself, `passive` is always asleep where it waits
(OMP_WAIT_POLICY), `torchvision` is its Mask R-CNN with a ResNet-18 on the same images, waiting as OpenMP does. Beside
them run: nothing; one process that never rests, or two; a training job with as many threads as there are cores, which
wait as OpenMP does by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks import harness
from benchmarks.peers import synthetic_batch
from detector.config import build, compose
from detector.ops.layers import to_preferred_layout
from detector.runtime import PRECISIONS, autocast, keep_freed_memory
from detector.threads import CHOSEN, follow, share_cores

SIZE, CLASSES, RANKS = (128, 128), 5, 2
SETTLES = 12  # seconds: others start in the first of them, and threads look again after five calm ones
BESIDE = ["quiet", "one", "two", "job"]


def quickstart(
    args: argparse.Namespace, steps: int, watched: bool = False, by_number: bool = False
) -> Callable[[], None]:
    """Some steps of the quickstart's model on images of its size."""
    torch.set_num_threads(threads(args))
    if watched:
        share_cores(by_number)
    keep_freed_memory()
    cfg = compose("train", ["experiment=quickstart", "data.root=none"])
    model = to_preferred_layout(build(cfg.model, "model", num_classes=CLASSES), torch.device("cpu"))
    data = synthetic_batch(share(args), SIZE, 6, "cpu")
    data.targets.labels.remainder_(CLASSES).add_(1)
    return work_of(args, model, (data.batch,), data.targets, steps)


def torchvisions(args: argparse.Namespace, steps: int) -> Callable[[], None]:
    torch.set_num_threads(threads(args))
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    sizes = {"min_size": SIZE[0], "max_size": SIZE[1]}
    model = MaskRCNN(backbone, CLASSES + 1, **sizes, box_batch_size_per_image=64, rpn_post_nms_top_n_train=300)
    data = synthetic_batch(share(args), SIZE, 6, "cpu")
    for target in data.their_targets:
        target["labels"].remainder_(CLASSES).add_(1)
    return work_of(args, model, (data.images,), data.their_targets, steps)


def threads(args: argparse.Namespace) -> int:
    """Of a process."""
    return 1 if args.work == "ranks" else args.threads


def share(args: argparse.Namespace) -> int:
    """The images of a process at a time."""
    return args.batch // RANKS if args.work == "ranks" else args.batch


def work_of(
    args: argparse.Namespace, model: torch.nn.Module, images: tuple, targets: Any, steps: int
) -> Callable[[], None]:
    if args.work == "predict":
        return settled(partial(predict, model.eval(), images, steps, args.dtype))
    if args.work == "ranks":
        warnings.filterwarnings("ignore", message="Grad strides")  # of 1 x 1 layers, whose layout is one of two
        model = DistributedDataParallel(model)
    work = partial(train, model.train(), (*images, targets), steps, args.dtype)
    return work if args.work == "ranks" else settled(work)  # two ranks must take as many turns


def settled(work: Callable[[], None]) -> Callable[[], None]:
    """The work, whose first turn, which does not count, lasts until threads have found out what suits the machine."""
    end = math.inf

    def turn() -> None:
        nonlocal end
        end = min(end, time.monotonic() + SETTLES)
        work()
        while time.monotonic() < end:
            work()

    return turn


def train(model: torch.nn.Module, inputs: tuple, steps: int, precision: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9, momentum=0.9)
    for _ in range(steps):
        follow()
        with autocast(torch.device("cpu"), precision):
            losses = model(*inputs)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def predict(model: torch.nn.Module, images: tuple, steps: int, precision: str) -> None:
    for _ in range(steps):
        follow()
        with autocast(torch.device("cpu"), precision):
            model(*images)


def ranks(work: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """The work of two processes in step: this one, and one that does the same until this one has ended."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        other = os.fork() == 0
        dist.init_process_group("gloo", f"file://{folder}/store", rank=int(other), world_size=RANKS)
        dist.barrier()  # both have met: the folder may go
    if not other:
        return work()
    with contextlib.suppress(RuntimeError):  # the other process has ended
        step = work()
        while True:
            step()
    os._exit(0)


def never_rest() -> None:
    while True:
        pass


def train_on(args: argparse.Namespace) -> None:
    work = quickstart(argparse.Namespace(**{**vars(args), "work": "train"}), 1)
    while True:
        work()


def main() -> None:
    options = harness.parser(__doc__, repeats=7)
    options.add_argument("--work", choices=["train", "predict", "ranks"], default="train")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--steps", type=int, default=4, help="steps of a turn")
    options.add_argument("--dtype", choices=PRECISIONS, default="fp32")
    names = ["ours", "fewer", "openmp", "passive", "torchvision"]
    options.add_argument("--contenders", nargs="+", choices=names, default=names)
    options.add_argument("--beside", nargs="+", choices=BESIDE, default=BESIDE, help="the first one counts as 100 %%")
    args = options.parse_args()
    ours = partial(quickstart, args, args.steps)
    contenders = {
        "ours": (partial(ours, watched=True), {}),
        "fewer": (partial(ours, watched=True, by_number=True), {}),
        "openmp": (ours, {}),
        "passive": (ours, {"OMP_WAIT_POLICY": "PASSIVE"}),
        "torchvision": (partial(torchvisions, args, 1), {}),
    }
    contenders = {name: contenders[name] for name in args.contenders}
    if args.work == "ranks":
        contenders = {name: (partial(ranks, build), theirs) for name, (build, theirs) in contenders.items()}
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
