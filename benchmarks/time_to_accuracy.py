"""AP against iterations and against CPU seconds: torchvision's own detector with its reference's training settings and
ours with the recipe of the data set, on the same body, sizes and pictures; and which part makes the difference.

    python benchmarks/time_to_accuracy.py --data bccd --root ../shared/data/bccd --seeds 3
    python benchmarks/time_to_accuracy.py --data bccd --root ../shared/data/bccd --seeds 3 --exchange schedule norms
    python benchmarks/time_to_accuracy.py --list

`--exchange` gives ours a part as torchvision has it, one at a time; `all` gives it all of them at once. Every run is
kept in --out: the same command goes on where it was stopped, with more seeds or parts it runs what is missing. `--base`
gives a part to all of ours, whatever else is exchanged; `trained_alike` is torchvision's detector by our optimiser and
schedule, those of `--base`; `--ours` leaves torchvision out, as where bf16 is compared with fp32:

    python benchmarks/time_to_accuracy.py --data bccd --root ../shared/data/bccd --seeds 5 --ours --exchange bf16

`--data digits` is a crowded set that benchmarks/digits.py writes, by which no recipe was chosen.
The differences of the last AP have 95 % intervals over seeds and validation images (comparison/statistics.py).

CPU seconds are those of the training process, evaluations left out. Both read pictures in the training process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import cv2
import hydra
import numpy as np
import torch
from pycocotools import mask as rle_tools
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.data import Reference
from detector.comparison.charts import line_chart
from detector.comparison.report import STYLE
from detector.comparison.statistics import difference, draws, match, metrics, resample
from detector.config import CONFIGS, build, check
from detector.data.loader import split_files
from detector.engine import train as engine
from detector.engine.optimizer import build_optimizer
from detector.evaluation import coco_metrics
from detector.heads.trunk import RoILinear

KINDS = ("bbox", "segm")
TURNED = "{_target_: albumentations.D4, p: 1.0}"  # for pictures without an up and a down
MIRRORED = "{_target_: albumentations.HorizontalFlip}"
ROIS = "model.box_head.batch_size_per_image"  # for digits as many as `detector validate` proposes


class Setting(NamedTuple):
    """A data set at a size that one core learns in minutes, by the recipe that the project has for it."""

    experiment: str
    resize: tuple[int, int] | None  # shorter side, limit of the longer one; None: pictures as they are
    batch: int
    iterations: int
    anchors: tuple[int, ...]
    change: str = TURNED  # the recipe's augmentation
    overrides: tuple[str, ...] = ()  # of the recipe


SETS = {
    "bccd": Setting("faster_rcnn_bccd", (120, 160), 4, 150, (6, 12, 24, 36, 48)),
    "nuclei": Setting("mask_rcnn_nuclei", (128, 256), 4, 120, (6, 12, 24, 48, 96)),
    "shapes": Setting("quickstart", None, 8, 150, (12, 24, 48, 96, 144)),
    "digits": Setting("small", None, 4, 420, (12, 24, 48, 96, 144), MIRRORED, ("data=custom", f"{ROIS}=128")),
}
POINTS = 3  # evaluations of a run
# what torchvision's reference trains with: references/detection/train.py
EPOCHS, STEPS, WARMUP, RATE, MOMENTUM, DECAY = 26, (16, 22), 1000, 0.02, 0.9, 1e-4

PARTS = {
    "initialisation": "fully connected and last layers as torch draws them, no zero or tiny predictors",
    "sampling": "512 RoIs and 256 anchors of an image enter the losses",
    "proposals": "2000 proposals after NMS, of 2000 a level",
    "norms": "no norms in neck and heads",
    "level_rule": "RoIs are pooled at FPN's own level (224), by torchvision's rule",
    "weight_decay": "weight decay on norms and biases too",
    "schedule": "SGD, rate 0.02 for 16 images, warm-up over the first epoch, divided by ten after 16/26 and 22/26",
    "augmentation": "mirrored half of the time, nothing else",
    "masks": "mask targets are shares, sampled half a pixel off",
    "resize": "pictures shrink bilinearly, without averaging",
}
OURS = {
    "bf16": "what recipes choose by themselves where the processor has it; all else here is fp32",
    "adamw": "AdamW at rate 0.003: the recipes' optimiser until Muon",
    "small_predictors": "last layers of the box head near zero, as Fast R-CNN's and, until 2026-11-27, the recipes'",
    "few_rois": "64 RoIs of an image in the losses, as recipes have it where nothing else is said",
    "more_rois": "128 RoIs of an image in the losses, as the digits have it",
    "turns": "pictures turned by quarters too, as all recipes of `small` had it until 2026-11-27",
}
THEIRS = {"trained_alike": "torchvision's detector, trained by our optimiser and schedule, clipped as ours"}
TRAINING = ("adamw", "schedule", "weight_decay")  # parts that `trained_alike` can share
SAME = {
    "low_quality": "both take an object's best anchors, whatever their overlap",
    "loss": "both have smooth L1 with beta 1/9 and the mean over what was sampled",
}


def reference_schedule(setting: Setting, images: int) -> tuple[int, list[int]]:
    """The iterations of torchvision's warm-up, and those after which its rate falls, on so many training images."""
    warmup = min(WARMUP, max(1, images // setting.batch - 1), setting.iterations - 1)
    return warmup, [round(setting.iterations * step / EPOCHS) for step in STEPS]


def part_overrides(part: str, name: str, images: int) -> list[str]:
    """The configuration that gives our recipe for a set of so many training images one of PARTS."""
    setting = SETS[name]
    masks = name != "bccd"
    warmup, steps = reference_schedule(setting, images)
    heads = ("box_head", "mask_head")[: 1 + masks]
    known = {
        "sampling": ["model.rpn.batch_size_per_image=256", f"{ROIS}=512"],
        "proposals": ["model.rpn.pre_nms_top_n=[2000,1000]", "model.rpn.post_nms_top_n=[2000,1000]"],
        "norms": ["model.neck.norm=null", *(f"model.{head}.trunk.norm=null" for head in heads)],
        "level_rule": [
            text
            for head in heads
            for text in (f"model.{head}.level_rule=torchvision", f"model.{head}.canonical_size=224")
        ],
        "weight_decay": ["training.decay_norms=true", "training.decay_biases=true"],
        "schedule": [
            *("optimizer=sgd", f"optimizer.lr={RATE}", f"optimizer.momentum={MOMENTUM}", "schedule=step"),
            f"optimizer.weight_decay={DECAY}",
            *("schedule.max_epochs=null", f"schedule.milestones={steps}", f"schedule.warmup={warmup}"),
            *("training.reference_batch=16", "training.clip_norm=null"),
        ],
        "bf16": ["runtime.precision=bf16"],
        "adamw": ["optimizer=adamw", "optimizer.lr=3e-3"],
        "small_predictors": ["model.box_head.predictor_init=small"],
        "few_rois": [f"{ROIS}=64"] if name == "digits" else [],
        "more_rois": [f"{ROIS}=128"] if name != "digits" else [],
        "masks": ["model.mask_head.target_threshold=null", "++model.mask_head.target_aligned=false"] if masks else [],
    }
    if part in ("augmentation", "turns"):
        change = MIRRORED if part == "augmentation" else TURNED
        return pipelines(setting, change) if change != setting.change else []
    if part == "resize":
        return pipelines(setting, setting.change, interpolation="1") if setting.resize else []
    return known[part]


def pipelines(setting: Setting, change: str, interpolation: str = "area") -> list[str]:
    """The configuration of both pipelines, of which training has one `change` more."""
    steps = []
    if setting.resize is not None:
        size = f"size: {setting.resize[0]}, max_size: {setting.resize[1]}"
        steps = [f"{{_target_: detector.data.ResizeShortestEdge, {size}, interpolation: {interpolation}}}"]
    return [f"augment.train=[{','.join([*steps, change])}]", f"augment.val=[{','.join(steps)}]"]


def recipe(name: str, root: Path, seed: int, folder: Path, overrides: Sequence[str]) -> Any:
    """Our configuration of a set, everything on one thread."""
    setting = SETS[name]
    every = setting.iterations // POINTS
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose(
            "train",
            [
                *(f"experiment={setting.experiment}", f"data.root={root}", f"seed={seed}", f"run_dir={folder}"),
                *(f"schedule.max_iterations={setting.iterations}", f"training.batch_size={setting.batch}"),
                f"model.rpn.anchor_sizes={[[size] for size in setting.anchors]}",
                *(f"evaluation.every={every}", "resume=none", "runtime.device=cpu", "runtime.workers=0", "logger=[]"),
                *(f"runtime.threads={torch.get_num_threads()}", "runtime.verbosity=quiet", "runtime.precision=fp32"),
                f"runtime.checkpoint_every={setting.iterations}",
                *pipelines(setting, setting.change),
                *setting.overrides,
                *overrides,
            ],
        )
    check(cfg)
    return cfg


# ---------------------------------------------------------------------------------------------------------------- ours


def as_torchvision_draws(model: nn.Module) -> None:
    """Weights of the box head as torchvision's constructors leave them; those of the other parts are the same."""
    for layer in model.box_head.modules():
        if isinstance(layer, (nn.Linear, RoILinear)):
            bound = layer.weight[0].numel() ** -0.5
            for values in (layer.weight, layer.bias):
                nn.init.uniform_(values, -bound, bound)


def train_ours(name: str, root: Path, seed: int, folder: Path, parts: Sequence[str]) -> tuple[list, list]:
    """Our training with `parts` as torchvision has them; its curve and its last results."""
    images = len(json.loads(annotation_files(name, root)["train"][1].read_text(encoding="utf-8"))["images"])
    overrides = [text for part in parts if part != "initialisation" for text in part_overrides(part, name, images)]
    cfg = recipe(name, root, seed, folder, overrides)
    create, measure = engine.State.create, engine.measure
    evaluating, marks, start = [0.0], [], time.process_time()

    def created(*args, **keywords):
        state = create(*args, **keywords)
        if "initialisation" in parts:
            with torch.no_grad():
                as_torchvision_draws(state.model)
        return state

    def measured(run, state, *args, **keywords):
        began = time.process_time()
        better = measure(run, state, *args, **keywords)
        marks.append(point(state.iteration, began - start - evaluating[0], state.metrics))
        evaluating[0] += time.process_time() - began
        return better

    with patch.object(engine.State, "create", created), patch.object(engine, "measure", measured):
        engine.train(cfg)
    results = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    return marks, results


def point(iteration: int, seconds: float, numbers: dict[str, dict[str, float]]) -> dict[str, float]:
    found = {kind: round(numbers[kind]["AP"], 5) for kind in KINDS if kind in numbers}
    return {"iteration": iteration, "cpu_s": round(seconds, 1), **found}


def annotation_files(name: str, root: Path) -> dict[str, tuple[Path, Path]]:
    """(folder of images, annotation file) of both splits."""
    cfg = recipe(name, root, 0, root, [])
    return {split: tuple(paths[0] for paths in split_files(cfg.data, split)) for split in ("train", "val")}


# --------------------------------------------------------------------------------------------------------- torchvision


class Body(nn.Module):
    """Our ResNet and torchvision's pyramid, as torchvision's detectors want a backbone."""

    def __init__(self, body: nn.Module, out_channels: int):
        super().__init__()
        self.body, self.out_channels = body, out_channels
        self.fpn = FeaturePyramidNetwork(list(body.out_channels), out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn({str(i): level for i, level in enumerate(self.body(images))})


def torchvision_model(name: str, cfg: Any, classes: int) -> nn.Module:
    """torchvision's detector: its own numbers for everything but the widths, the anchors' sizes and the body."""
    model, masks = cfg.model, detection.mask_rcnn
    width, fc = model.neck.out_channels, model.box_head.trunk.fc_channels[-1]
    backbone = Body(build(model, "model", num_classes=classes).backbone, width)
    size = SETS[name].resize or (160, 160)
    common = {
        "min_size": size[0],
        "max_size": size[1],
        "rpn_anchor_generator": AnchorGenerator(
            tuple(tuple(sizes) for sizes in model.rpn.anchor_sizes), ((0.5, 1.0, 2.0),) * 5
        ),
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        "image_mean": [value / 255 for value in model.pixel_mean],
        "image_std": [value / 255 for value in model.pixel_std],
        "box_head": detection.faster_rcnn.TwoMLPHead(width * 49, fc),
        "box_predictor": detection.faster_rcnn.FastRCNNPredictor(fc, classes + 1),
    }
    if model.get("mask_head") is None:
        return detection.FasterRCNN(backbone, **common)
    return detection.MaskRCNN(
        backbone,
        **common,
        mask_head=masks.MaskRCNNHeads(width, tuple(model.mask_head.trunk.conv_channels), 1),
        mask_predictor=masks.MaskRCNNPredictor(width, model.mask_head.upsample_channels, classes + 1),
    )


def order(images: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Endless batches; every epoch another permutation."""
    generator = torch.Generator().manual_seed(seed)
    flow = itertools.chain.from_iterable(
        torch.randperm(images, generator=generator).tolist() for _ in itertools.count()
    )
    while True:
        yield list(itertools.islice(flow, batch))


def train_torchvision(name: str, root: Path, seed: int, folder: Path, parts: Sequence[str]) -> tuple[list, list]:
    """Training torchvision's detector by our optimiser and schedule but for `parts`: its curve and its last results."""
    setting, files = SETS[name], annotation_files(name, root)
    masks = recipe(name, root, seed, folder, []).model.get("mask_head") is not None
    data = {split: Reference(*files[split], masks=masks) for split in files}
    images = len(data["train"].ids)
    overrides = [text for part in parts for text in part_overrides(part, name, images)]
    cfg = recipe(name, root, seed, folder, overrides)
    categories = sorted(data["train"].coco.cats)
    label_of = {category: label for label, category in enumerate(categories, 1)}
    torch.manual_seed(seed)
    model = torchvision_model(name, cfg, len(categories))
    training = build(cfg.training, "training")
    optimizer = build_optimizer(build(cfg.optimizer, "optimizer"), model, training)
    scheduler = LambdaLR(optimizer, build(cfg.schedule, "schedule").factor(images // setting.batch))
    batches, marks, spent, results = order(images, setting.batch, seed), [], 0.0, []
    for iteration in range(1, setting.iterations + 1):
        began = time.process_time()
        pictures, targets = zip(*(data["train"].sample(index) for index in next(batches)))
        for target in targets:
            target["labels"] = torch.tensor([label_of[c] for c in target["labels"].tolist()], dtype=torch.int64)
        losses = model.train()(list(pictures), list(targets))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        if training.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), training.clip_norm)
        optimizer.step()
        scheduler.step()
        spent += time.process_time() - began
        if iteration % (setting.iterations // POINTS) == 0:
            results = found(model.eval(), data["val"], categories)
            numbers = {kind: coco_metrics(files["val"][1], results, kind) for kind in KINDS[: 1 + masks]}
            marks.append(point(iteration, spent, numbers))
    return marks, results


@torch.inference_mode()
def found(model: nn.Module, data: Reference, categories: Sequence[int]) -> list[dict]:
    """COCO results of the validation set."""
    results = []
    for image_id in data.ids:
        record = data.coco.imgs[image_id]
        picture = cv2.imread(str(data.folder / record["file_name"]))[..., ::-1]
        image = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255
        (output,) = model([image])
        for index, (x1, y1, x2, y2) in enumerate(output["boxes"].tolist()):
            result = {
                "image_id": image_id,
                "category_id": categories[int(output["labels"][index]) - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": output["scores"][index].item(),
            }
            if "masks" in output:
                mask = (output["masks"][index, 0] > 0.5).numpy()
                result["segmentation"] = rle_tools.encode(np.asfortranarray(mask, np.uint8))
                result["segmentation"]["counts"] = result["segmentation"]["counts"].decode()
            results.append(result)
    return results


# ---------------------------------------------------------------------------------------------------------------- main


def contender(name: str) -> tuple[str, list[str]]:
    """("torchvision" | "ours", the parts that are as torchvision has them) of the name of a contender."""
    if name in ("torchvision", "trained_alike"):
        return "torchvision", ["schedule", "weight_decay"] if name == "torchvision" else []
    parts = [] if name == "ours" else list(PARTS) if name == "all" else name.split("+")
    return "ours", parts


def run(args: argparse.Namespace, name: str, seed: int) -> dict:
    """A run, or what is kept of it."""
    who, parts = contender(name)
    alike = [part for part in args.base if part in TRAINING] if name == "trained_alike" else []
    base = args.base if who == "ours" else alike
    length = "" if args.iterations is None else f"-{args.iterations}"
    file = args.out / f"{args.data}{length}" / f"{'+'.join([name, *base])}-{seed}.json"
    if not file.exists():
        folder = file.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)
        if who == "ours":
            curve, results = train_ours(args.data, args.root, seed, folder, [*base, *parts])
        else:
            curve, results = train_torchvision(args.data, args.root, seed, folder, [*base, *parts])
        shutil.rmtree(folder, ignore_errors=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps({"curve": curve, "results": results}), encoding="utf-8")
        partial.replace(file)
        print(f"{name} seed {seed}: {curve[-1]}", flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def compared(args: argparse.Namespace, runs: dict[str, list[dict]], kind: str) -> dict[str, dict]:
    """Per contender its last AP, and its difference to ours with the interval, in points."""
    truth = annotation_files(args.data, args.root)["val"][1]
    drawn, summary = {}, {}
    for name, of_seeds in runs.items():
        matched = [match(truth, each["results"], kind) for each in of_seeds]
        weights = draws(len(matched[0].image_ids), args.draws)
        drawn[name] = np.stack([metrics(resample(each, weights, areas=(0,)))["AP"] for each in matched])
    for name, of_seeds in runs.items():
        values = [each["curve"][-1][kind] for each in of_seeds]
        ours = [each["curve"][-1][kind] for each in runs["ours"]]
        shift = difference(ours, values, drawn["ours"], drawn[name])
        summary[name] = {
            "AP": [round(100 * value, 2) for value in values],
            "mean": round(100 * float(np.mean(values)), 2),
            "to_ours": [round(100 * v, 2) for v in (shift.delta, shift.low, shift.high)],
            "cpu_s": round(float(np.mean([each["curve"][-1]["cpu_s"] for each in of_seeds])), 1),
        }
    return summary


def chart(runs: dict[str, list[dict]], kind: str, against: str) -> str:
    """AP of ours and torchvision's against iterations or CPU seconds, with the range of the seeds as bands."""
    series, bands = {}, {}
    for name in ("ours", "torchvision"):
        values = np.array([[100 * mark[kind] for mark in each["curve"]] for each in runs[name]])
        places = np.array([[mark[against] for mark in each["curve"]] for each in runs[name]]).mean(0)
        series[name] = (places.tolist(), values.mean(0).tolist())
        bands[name] = list(zip(values.min(0).tolist(), values.max(0).tolist()))
    names = {"iteration": "iterations", "cpu_s": "CPU seconds"}
    return line_chart(series, names[against], f"{kind} AP", bands, from_zero=True)


def side_by_side(charts: Sequence[str], width: int = 350, height: int = 300) -> str:
    """Charts as one SVG file that looks as the report's page has them."""
    style = STYLE.replace("svg { width: 100%; height: auto; }", "svg { background: var(--paper); }")
    parts = [
        text.replace("<svg ", f'<svg x="{width * i}" width="{width - 10}" height="{height}" ', 1)
        for i, text in enumerate(charts)
    ]
    size = f'viewBox="0 0 {width * len(charts)} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{"".join(parts)}</svg>\n'


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", choices=SETS, default="bccd")
    options.add_argument("--root", type=Path, help="where the data set lies")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--exchange", nargs="+", default=[], metavar="PART", help="parts, a+b together, or all")
    options.add_argument("--iterations", type=int, help="of a run, instead of what is usual here")
    options.add_argument("--base", nargs="+", default=[], metavar="PART", help="parts that all of ours have")
    options.add_argument("--ours", action="store_true", help="without torchvision, and so without a chart")
    options.add_argument("--list", action="store_true", help="say what can be exchanged, and what has been run")
    options.add_argument("--out", type=Path, default=Path("runs/time_to_accuracy"), help="where runs are kept")
    options.add_argument("--draws", type=int, default=500, help="of the bootstrap")
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--json", type=Path, help="file to write the figures to")
    options.add_argument("--chart", type=Path, help="SVG to write the curves to")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(0)
    if args.list:
        same = {name: f"the same: {text}" for name, text in SAME.items()}
        for part, meaning in {**PARTS, **OURS, **THEIRS, **same}.items():
            print(f"{part:15} {meaning}")
        for file in sorted(args.out.glob("*/*.json")):
            print(f"{file.parent.name}/{file.stem}: {json.loads(file.read_text(encoding='utf-8'))['curve'][-1]}")
        return
    unknown = [part for name in [*args.exchange, *args.base] for part in contender(name)[1] if part not in PARTS | OURS]
    if unknown or args.root is None:
        options.error(f"unknown part {unknown[0]!r}: see --list" if unknown else "--root: where the data set lies")

    if args.iterations is not None:
        SETS[args.data] = SETS[args.data]._replace(iterations=args.iterations)
    names = ["ours", *(() if args.ours else ("torchvision",)), *args.exchange]
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for seed in range(args.seeds):
        for name in names:
            runs[name].append(run(args, name, seed))
    kinds = [kind for kind in KINDS if kind in runs["ours"][0]["curve"][-1]]
    figures = {kind: compared(args, runs, kind) for kind in kinds}
    for kind in kinds:
        rows = [
            [name, row["mean"], "{} ({} to {})".format(*row["to_ours"]), row["cpu_s"]]
            for name, row in figures[kind].items()
        ]
        print(f"\n{kind} AP after {SETS[args.data].iterations} iterations, {args.seeds} seeds")
        print(harness.table(["", "AP", "against ours (95 %)", "CPU s"], rows))
    curves = {name: [each["curve"] for each in of_seeds] for name, of_seeds in runs.items()}
    harness.save(args.json, "cpu", setting=SETS[args.data]._asdict(), last=figures, curves=curves)
    if args.chart and not args.ours:
        parts = [chart(runs, kinds[-1], against) for against in ("iteration", "cpu_s")]
        args.chart.write_text(side_by_side(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
