"""What papers say about RoI methods, measured: the runs that each claim of docs/claims.md needs, and its numbers.

    python benchmarks/claims.py list                         claim, run, state
    python benchmarks/claims.py train [--claims 9 10]        what is not finished yet; started again, it goes on
    python benchmarks/claims.py measure [--claims 9 10]      benchmarks/results/claims.json, and the tables

Sized for one CPU core, about half a minute for a run: pictures of 112 x 112 px, made by `detector shapes`, and all runs
of a set continue one model, the quickstart's (`--quickstart`), trained on them with the exact integral of
PreciseRoIPool, which has no sampling points and rounds nothing. The seed draws the order of the pictures. A run may
serve several claims. Several processes may train, each with seeds of its own (`--seeds`), once the starts are made.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from pycocotools import mask as rle_tools
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.roi_ops import CHANNELS, IMAGE, STRIDES, make_rois
from detector.commands.make_shapes import make_shapes
from detector.comparison.alignment import measure_alignment
from detector.comparison.runs import read_run
from detector.comparison.statistics import Bands, difference, draws, match, metrics, resample
from detector.comparison.summary import training_curve
from detector.config import RunError, arguments
from detector.data import CocoDataset, build_dataset, build_loader, collate_images
from detector.data.annotations import Truth
from detector.data.read_coco import read_json, read_truth
from detector.engine.train import train
from detector.evaluation.coco import as_rle, check_annotations, check_predictions
from detector.evaluation.evaluator import predict
from detector.inference.load import load
from detector.inference.predict import Detector
from detector.roi import DeformableRoIPool, RoIAlign, RoIOp, RoIPool, assign_levels
from detector.roi.pool import bin_ranges, round_half_away
from detector.structures import with_image

SETS = {"shapes": {"train": 2000, "val": 200}, "figures": {"train": 1200, "val": 200}}
START_ITERATIONS, ITERATIONS = {"shapes": 100, "figures": 1500}, 50
SIDE, SEEDS, MOST = 112, 5, 20  # px; of each way; detections of a class in a picture that count
SMALL = [  # what all runs share; optimiser and first weights as when docs/claims.md was made
    "optimizer=adamw",
    "optimizer.lr=1.0e-3",
    "model.box_head.predictor_init=small",
    "runtime.device=cpu",
    "runtime.threads=1",
    "runtime.workers=0",
    "runtime.tensorboard=false",
    "runtime.keep=1",
    "runtime.log_every=5",
    "logger=[]",
    f"evaluation.max_detections=[1,10,{MOST}]",
]
# names of ways to train, and what they change
WAYS: dict[str, list[str]] = {
    "start": ["roi=precise"],
    "align": ["roi=align"],
    "pool": ["roi=pool"],
    "deformable": ["roi=deformable_small"],
    "modulated": ["roi=modulated_deformable_small"],
    "points_1": ["roi=align", "roi.sampling_ratio=1"],
    "points_4": ["roi=align", "roi.sampling_ratio=4"],
    "points_adaptive": ["roi=align_adaptive"],
    "levels_rule": ["roi=align", "model.box_head.canonical_size=56"],
    "levels_coarser": ["roi=align", "model.box_head.canonical_size=28"],
    "levels_all": ["roi=adaptive_pooling"],
    **{f"l2_{weight:g}": ["roi=deformable_small", f"model.offset_loss_weight={weight}"] for weight in (0, 0.01, 1, 10)},
    **{f"lr_x{f:g}": ["roi=deformable_small", f"training.lr_multipliers.offset_predictor={f}"] for f in (0.1, 10)},
}
METHODS = ["align", "pool", "deformable", "modulated"]
# by claim, the most informative first: the ways to train on each set. The first is what the others are held against
CLAIMS: dict[int, dict[str, list[str]]] = {
    9: {"shapes": ["align", "points_1", "points_4", "points_adaptive"]},
    8: {"shapes": METHODS},
    11: {"shapes": METHODS, "figures": METHODS},
    14: {"shapes": METHODS},
    12: {"shapes": ["levels_rule", "align", "levels_coarser", "levels_all"]},  # align's are a level finer
    10: {"shapes": ["deformable", "l2_0", "l2_0.01", "l2_1", "l2_10", "lr_x0.1", "lr_x10"]},
}
WITH_MASKS = (8, 11, 14)  # on shapes; the others are about boxes


@dataclass(frozen=True)
class Run:
    """A training run: a way to train, on a set, with a seed; without a way the start of a set's runs."""

    data: str
    way: str | None = None
    seed: int = 0
    masks: bool = False

    @property
    def name(self) -> str:
        kind = "masks" if self.masks else "boxes"
        return f"{self.data}-{kind}-{self.way}-{self.seed}" if self.way else f"{self.data}-start"

    def folder(self, root: Path) -> Path:
        return root / "runs" / self.name

    def state(self, root: Path) -> str:
        folder = self.folder(root)
        if (folder / "metrics.json").exists():
            return "finished"
        return "begun" if (folder / "last.pt").exists() else "missing"

    def overrides(self, root: Path, quickstart: Path) -> list[str]:
        """What `detector train` is given."""
        place = [f"data.root={root / 'data' / self.data}", f"run_dir={self.folder(root)}"]
        start = Run(self.data).folder(root) / "last.pt" if self.way else quickstart
        kind = ["experiment=ablation_shapes", f"model.weights={start}", f"seed={self.seed}"]
        kind += [f"schedule.max_iterations={ITERATIONS if self.way else START_ITERATIONS[self.data]}"]
        masks = self.masks or (self.data == "shapes" and self.way is None)
        kind += [] if masks else ["model=faster_rcnn", "data.masks=false"]
        return [*kind, *WAYS[self.way or "start"], *place, *SMALL]


def has_masks(claim: int, data: str) -> bool:
    return claim in WITH_MASKS and data == "shapes"


def runs_of(claims: Sequence[int], seeds: Sequence[int]) -> Iterator[tuple[int, Run]]:
    """The runs of claims in the order in which they are made, one seed of all ways after the other."""
    for claim in claims:
        for seed in seeds:
            for data, ways in CLAIMS[claim].items():
                for way in ways:
                    yield claim, Run(data, way, seed, has_masks(claim, data))


def train_missing(root: Path, claims: Sequence[int], seeds: Sequence[int], quickstart: Path) -> None:
    """Make what is not finished yet: pictures, starts and runs."""
    wanted = list(dict.fromkeys(run for _, run in runs_of(claims, seeds)))
    for data in dict.fromkeys(run.data for run in wanted):
        if not (root / "data" / data / "annotations" / "instances_val.json").exists():
            make_shapes(root / "data" / data, **SETS[data], size=SIDE, seed=1, kind=data)
    for run in [*dict.fromkeys(Run(run.data) for run in wanted), *wanted]:
        if run.way and Run(run.data).state(root) != "finished":
            print(f"{run.name}: its start is not finished yet", file=sys.stderr)
        elif run.state(root) != "finished":
            try:
                train(configuration(run.overrides(root, quickstart)))
            except RunError as error:  # another process makes it, or it diverges: the others go on
                print(f"{run.name}: {error}", file=sys.stderr)


def configuration(overrides: Sequence[str]) -> DictConfig:
    """That of `detector train` with these: engine.train takes it without the command's own report for each run."""
    return OmegaConf.create(arguments("train", overrides))


def listing(root: Path, claims: Sequence[int], seeds: Sequence[int]) -> str:
    rows = [[claim, run.name, run.state(root)] for claim, run in runs_of(claims, seeds)]
    finished = sum(row[-1] == "finished" for row in rows)
    return f"{harness.table(['claim', 'run', 'state'], rows)}\n{finished} of {len(rows)} finished"


# ---------------------------------------------------------------------------------------------- average precision


class Kinds(NamedTuple):
    """Kinds of objects that are measured apart: three names, and which objects they are."""

    names: tuple[str, str, str]
    bands: Bands


def limits(first: float, second: float) -> np.ndarray:
    return np.array([[-np.inf, np.inf], [-np.inf, first], [first, second], [second, np.inf]])


def sizes(truth: Truth, content: dict) -> Kinds:
    """Sides up to 16, 36 and above: a third of the shapes each."""
    return Kinds(("small", "medium", "large"), Bands(limits(16**2, 36**2)))


def visible(truth: Truth, content: dict) -> Kinds:
    """By the share that neither the border nor other objects hide; only figures say it."""
    shares = np.array([entry["visible_share"] for entry in content["annotations"]])
    return Kinds(("under 80 % visible", "80 to 95 %", "over 95 %"), Bands(limits(0.8, 0.95), shares))


def elongation(truth: Truth, content: dict) -> Kinds:
    """By the longer over the shorter side of the smallest rectangle, at any angle, around the mask."""
    ratios = []
    for mask in drawn(truth):
        _, sides, _ = cv2.minAreaRect(np.argwhere(mask)[:, ::-1].astype(np.float32))
        ratios.append((max(sides) + 1) / (min(sides) + 1))
    return Kinds(("under 1.3 long", "1.3 to 1.8", "over 1.8"), Bands(limits(1.3, 1.8), np.array(ratios)))


def drawn(truth: Truth) -> Iterator[np.ndarray]:
    """The masks [H, W] bool of all objects."""
    content = truth.to_coco()
    shapes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    for entry in content["annotations"]:
        yield rle_tools.decode(as_rle(entry["segmentation"], shapes[entry["image_id"]], "mask")).astype(bool)


class Judge:
    """AP of results on the validation set of a set, on it as it is and on bootstrap draws of its pictures."""

    def __init__(self, root: Path, data: str, samples: int):
        file = root / "data" / data / "annotations" / "instances_val.json"
        self.truth, self.content = read_truth(file), json.loads(file.read_text(encoding="utf-8"))
        own = [entry["image_id"] for entry in self.truth.to_coco(segmentation=False)["annotations"]]
        assert own == [entry["image_id"] for entry in self.content["annotations"]]  # so that values find their objects
        self.weights = draws(len(self.truth), samples)

    def numbers(self, results: list[dict], kind: str, kinds: Kinds) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """{name: value} and {name: [draws]} of AP, AP75 and the AP of each kind of objects, in percent."""
        checked = check_predictions(results, check_annotations(self.truth, kind), kind)
        matches = match(self.truth, checked, kind, MOST, kinds.bands)
        names = {"AP": "AP", "AP75": "AP75", **dict(zip(("APs", "APm", "APl"), kinds.names))}
        once, often = (metrics(resample(matches, w), MOST) for w in (None, self.weights))
        return {n: 100 * float(once[k][0]) for k, n in names.items()}, {n: 100 * often[k] for k, n in names.items()}


@functools.cache
def judge_of(root: Path, data: str, samples: int) -> Judge:
    return Judge(root, data, samples)


def compared(
    ways: Mapping[str, Mapping[int, list[dict]]], judge: Judge, kind: str, kinds: Kinds, against: Mapping[str, str]
) -> list[dict]:
    """A row for each way, {seed: results}: mean and deviation over seeds, and the difference to another with its 95 %
    interval over pictures and seeds, of the seeds that both have."""
    measured = {
        way: {seed: judge.numbers(results, kind, kinds) for seed, results in seeds.items()}
        for way, seeds in ways.items()
        if seeds
    }
    rows = []
    for way, seeds in measured.items():
        values = {name: [once[name] for once, _ in seeds.values()] for name in next(iter(seeds.values()))[0]}
        row = {"way": way, "iou": kind, "seeds": sorted(seeds)}
        row["mean"] = {name: round(float(np.mean(v)), 2) for name, v in values.items()}
        row["deviation"] = {name: round(float(np.std(v, ddof=1)), 2) for name, v in values.items() if len(v) > 1}
        base = measured.get(against.get(way, ""))
        if shared := sorted(set(seeds) & set(base or ())):
            row["against"] = against[way]
            row["difference"] = {}
            for name in values:
                sides = [[found[seed][i][name] for seed in shared] for i in (0, 1) for found in (base, seeds)]
                delta = difference(sides[0], sides[1], np.stack(sides[2]), np.stack(sides[3]))
                row["difference"][name] = [round(float(v), 2) for v in delta[:3]]
        rows.append(row)
    return rows


def finished(args: argparse.Namespace, claim: int, data: str) -> Iterator[Run]:
    """The finished runs of a claim on a set."""
    for way in CLAIMS[claim][data]:
        for seed in args.seeds:
            run = Run(data, way, seed, has_masks(claim, data))
            if run.state(args.root) == "finished":
                yield run


def results_of(args: argparse.Namespace, claim: int, data: str) -> dict[str, dict[int, list[dict]]]:
    """{way: {seed: COCO results}} of the finished runs of a claim on a set."""
    found: dict[str, dict[int, list[dict]]] = {}
    for run in finished(args, claim, data):
        results = read_json(run.folder(args.root) / "predictions.json", "prediction")
        found.setdefault(run.way, {})[run.seed] = results
    return found


def ap_rows(args: argparse.Namespace, claim: int, data: str, kind: str, by=sizes) -> list[dict]:
    """The ways of a claim on a set against the first of them."""
    judge, first = judge_of(args.root, data, args.samples), CLAIMS[claim][data][0]
    against = {way: first for way in CLAIMS[claim][data][1:]}
    found = results_of(args, claim, data)
    return compared(found, judge, kind, by(judge.truth, judge.content), against)


# --------------------------------------------------------------------------------------------- on trained models


def models(args: argparse.Namespace, claim: int, data: str) -> Iterator[tuple[Run, Detector]]:
    """The finished runs of a claim on a set, with their models."""
    for run in finished(args, claim, data):
        yield run, load(run.folder(args.root) / "last.pt")


def validation(detector: Detector) -> CocoDataset:
    return build_dataset(detector.config["data"], "val", detector.config["augment"], categories=detector.categories)


def rounding(quantization: str, stride: int = 16, bins: int = 7, count: int = 20_000) -> dict[str, float]:
    """How far, in pixels, RoI Pool's rounding moves the corner of a RoI, and the borders of bins: the largest and the
    mean of RoIs of 32 to 512 px at random places. A bin covers the cells from its first to before its last."""
    random = np.random.default_rng(0)
    start, side = random.uniform(64, 512, count) / stride, random.uniform(32, 512, count) / stride
    start, end = torch.from_numpy(start), torch.from_numpy(start + side)
    low, high = bin_ranges(start, end, bins, torch.full_like(start, 1e6), quantization)
    corner = (start.floor() if quantization == "floor" else round_half_away(start)) - start
    exact = start[:, None] + torch.arange(bins + 1) / bins * (end - start)[:, None]
    borders = torch.cat([low - exact[:, :-1], high - exact[:, 1:]])
    return {
        name: round(float(value) * stride, 1)
        for part, moved in (("corner", corner), ("both", borders))
        for name, value in ((f"{part}_most", moved.abs().max()), (f"{part}_mean", moved.abs().mean()))
    }


def shifts(args: argparse.Namespace) -> list[dict]:
    """What a shift by less than a cell changes in pooled features and predicted boxes, by way, over seeds."""
    found: dict[str, list[dict]] = {}
    for run, detector in models(args, 8, "shapes"):
        dataset = validation(detector)
        samples = [dataset[i] for i in range(args.pictures // 4)]  # each is looked at 13 times
        found.setdefault(run.way, []).append(measure_alignment(detector.model, samples))
    rows = []
    for way, parts in found.items():
        features = np.array([part["feature_shift"] for part in parts])[:, 1:-1]  # 0 and a whole stride change nothing
        row = {"way": way, "seeds": len(parts)}
        row |= {"features, mean": spread(features.mean(1)), "features, most": spread(features.max(1))}
        at = {pixels: [part["box_shift"][i] for part in parts] for i, pixels in enumerate(parts[0]["pixels"])}
        rows.append(row | {f"boxes, {pixels} px": spread(at[pixels]) for pixels in (1, 2, 4, 8, 16)})
    return rows


def spread(values: Sequence[float]) -> list[float]:
    """Mean and standard deviation, three digits."""
    return [round(float(np.mean(values)), 3), round(float(np.std(values, ddof=1)), 3) if len(values) > 1 else 0.0]


@torch.inference_mode()
def points(args: argparse.Namespace, data: str) -> list[dict]:
    """The shares of sampling points on the object and within 2 px of its outline, of RoIs that are the objects' boxes:
    of the box head's regular grid and of the same points moved by the learned offsets."""
    truth, found = judge_of(args.root, data, args.samples).truth, {}
    masks, starts = list(drawn(truth)), truth.object_starts
    for run, detector in models(args, 11, data):
        model, dataset = detector.model, validation(detector)
        extractor = model.box_head.stages[0].extractor
        if not isinstance(extractor.op, DeformableRoIPool):
            continue
        shares = []
        for index in range(min(len(dataset), args.pictures)):
            sample = dataset[index]
            row = truth.image_ids.tolist().index(sample.image_id)
            own = masks[starts[row] : starts[row + 1]]
            boxes = torch.from_numpy(sample.boxes)
            if not len(boxes):
                continue
            batch = collate_images([sample.image], [sample.original_size], [sample.image_id], [sample.key])
            features = model.features(batch)[: model.neck.roi_levels]
            offsets = extractor(features, with_image(boxes[None])[0]).offsets
            for box, offset, mask in zip(boxes, offsets, own, strict=True):
                shares.append([on_object(grid_points(box, extractor.op, o), mask) for o in (0 * offset, offset)])
        found.setdefault(run.way, []).append(np.mean(shares, axis=0))  # [2, 2]
    return [
        {"way": way, "data": data, "seeds": len(parts)}
        | {
            name: spread([100 * part[i] for part in parts])
            for name, i in (("grid inside", (0, 0)), ("inside", (1, 0)), ("grid, border", (0, 1)), ("border", (1, 1)))
        }
        for way, parts in found.items()
    ]


def grid_points(box: Tensor, op: DeformableRoIPool, offsets: Tensor) -> np.ndarray:
    """The sampling points [P, 2] (x, y) of a RoI, moved with their bins by offsets [2, k, k]."""
    ratio, side = op.align.sampling_ratio, offsets.shape[-1]
    steps = (torch.arange(side * ratio) + 0.5) / (side * ratio)
    fine = (op.gamma * offsets).repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)
    x = box[0] + (steps[None] + fine[0]) * (box[2] - box[0])
    y = box[1] + (steps[:, None] + fine[1]) * (box[3] - box[1])
    return torch.stack([x, y], 2).reshape(-1, 2).numpy()


def on_object(places: np.ndarray, mask: np.ndarray, near: float = 2.0) -> tuple[float, float]:
    """The shares of places [P, 2] on a mask, and within `near` px of its outline."""
    height, width = mask.shape
    column, row = np.floor(places).astype(int).T.clip(0, [[width - 1], [height - 1]])
    depth = sum(cv2.distanceTransform(np.uint8(part), cv2.DIST_L2, 5) for part in (mask, ~mask))
    return float(mask[row, column].mean()), float((depth[row, column] <= near).mean())


@contextlib.contextmanager
def misread(model: nn.Module, pixels: float) -> Iterator[None]:
    """The mask head reads its RoIs `pixels` to the right and below of where they are: as if the features lay wrong."""

    def move(_, inputs):
        features, rois = inputs
        return features, torch.cat([rois[:, :1], rois[:, 1:] + pixels], 1)

    handle = model.mask_head.extractor.register_forward_pre_hook(move)
    try:
        yield
    finally:
        handle.remove()


def shifted_masks(args: argparse.Namespace) -> list[dict]:
    """Mask and boundary AP of trained models, and of the same with a mask head that reads a pixel beside."""
    ways: dict[str, dict[int, list[dict]]] = results_of(args, 14, "shapes")
    against = {}
    for run, detector in models(args, 14, "shapes"):
        dataset, data = validation(detector), detector.config["data"]
        padding = {key: data[key] for key in ("group_by_aspect", "pad_multiple", "pad_to")}
        loader = build_loader(dataset, 8, 0, training=False, **padding)
        with misread(detector.model, 1.0), contextlib.closing(loader):
            found, _ = predict(detector.model, loader, dataset.category_ids, torch.device("cpu"), progress=False)
        name = f"{run.way}, 1 px beside"
        ways.setdefault(name, {})[run.seed] = [entry for entries in found.values() for entry in entries]
        against[name] = run.way
    judge, rows = judge_of(args.root, "shapes", args.samples), []
    for kind in ("segm", "boundary"):
        rows += compared(ways, judge, kind, sizes(judge.truth, judge.content), against)
    return rows


def offsets(args: argparse.Namespace) -> list[dict]:
    """Mean length of the offsets over training, and the largest loss after the first steps: infinite if one was."""
    curves: dict[str, list[dict]] = {}
    for run in finished(args, 10, "shapes"):
        curves.setdefault(run.way, []).append(training_curve(read_run(run.folder(args.root), "last")))
    rows = []
    for way, own in curves.items():
        norms = [curve[key] for curve in own for key in curve if key.endswith("offsets_mean_norm")]
        losses = [np.inf if loss is None else loss for curve in own for loss in curve["loss"][1:]]
        row = {"way": way, "seeds": len(own)}
        steps = own[0]["iteration"]
        for share in (0.2, 0.5, 1):
            at = min(range(len(steps)), key=lambda i: abs(steps[i] - share * ITERATIONS))
            row[f"norm at step {steps[at]}"] = spread([norm[at] for norm in norms])
        rows.append(row | {"largest loss": round(float(max(losses)), 3)})
    return rows


def costs(args: argparse.Namespace) -> list[dict]:
    """CPU time of forward and backward of 256 RoIs on P2-P5 of an 800 x 1088 image, and parameters, beside align's."""
    rois = make_rois(256, "pyramid", 1)
    levels, strides = assign_levels(rois[:, 1:], STRIDES["pyramid"]), STRIDES["pyramid"]
    maps = [torch.randn(1, CHANNELS, IMAGE[0] // s, IMAGE[1] // s) for s in strides]
    maps = [m.contiguous(memory_format=torch.channels_last).requires_grad_() for m in maps]
    cases = {
        "align": [(7, 2), (14, 2), (28, 2), (7, 1), (7, 4), (14, 1), (14, 4)],
        "pool": [(7, None), (14, None), (28, None)],
        "deformable": [(7, 2), (14, 2), (7, 1), (7, 4)],
        "modulated": [(7, 2), (14, 2)],
    }
    make = {
        "align": lambda k, ratio: RoIAlign(k, ratio),
        "pool": lambda k, ratio: RoIPool(k),
        "deformable": lambda k, ratio: DeformableRoIPool(k, CHANNELS, ratio),
        "modulated": lambda k, ratio: DeformableRoIPool(k, CHANNELS, ratio, modulated=True),
    }
    ops, steps = {}, {}
    for way, settings in cases.items():
        for case in settings:
            op = ops[way, case] = make[way](*case)
            steps[way, case] = functools.partial(step, op, maps, rois, levels, strides)
    seconds = harness.interleave(steps, args.repeats, clock=time.process_time)
    base = statistics.median(seconds["align", (7, 2)])
    return [
        {
            "way": way,
            "k": case[0],
            "points": case[1] and case[1] ** 2,
            "ms": round(1000 * statistics.median(taken), 1),
            "times": round(statistics.median(taken) / base, 2),
            "parameters": sum(p.numel() for p in ops[way, case].parameters()),
        }
        for (way, case), taken in seconds.items()
    ]


def step(op: RoIOp, maps: list[Tensor], rois: Tensor, levels: Tensor, strides: Sequence[int]) -> None:
    """Forward and backward."""
    for leaf in (*maps, *op.parameters()):
        leaf.grad = None
    op(maps, rois, levels, strides).features.sum().backward()


MEASURES: dict[int, Callable[[argparse.Namespace], dict]] = {
    8: lambda args: {
        "rounding": [{"way": name, **rounding(name)} for name in ("caffe", "floor")],
        "shifts": shifts(args),
        "ap": [row for kind in ("bbox", "segm") for row in ap_rows(args, 8, "shapes", kind)],
    },
    9: lambda args: {"ap": ap_rows(args, 9, "shapes", "bbox")},
    10: lambda args: {"offsets": offsets(args), "ap": ap_rows(args, 10, "shapes", "bbox")},
    11: lambda args: {
        "ap": {
            f"{data}, {by.__name__}": [
                row
                for kind in (("bbox", "segm") if has_masks(11, data) else ("bbox",))
                for row in ap_rows(args, 11, data, kind, by)
            ]
            for data, by in (("shapes", elongation), ("figures", elongation), ("figures", visible))
        },
        "points": [row for data in CLAIMS[11] for row in points(args, data)],
    },
    12: lambda args: {"ap": ap_rows(args, 12, "shapes", "bbox")},
    13: lambda args: {"costs": costs(args)},
    14: lambda args: {"ap": shifted_masks(args)},
}


def measure(args: argparse.Namespace) -> None:
    """The numbers of the chosen claims, beside those of the others that the file holds."""
    path = args.json
    found = json.loads(path.read_text(encoding="utf-8"))["claims"] if path.exists() else {}
    for claim in args.claims:
        found[str(claim)] = MEASURES[claim](args)
        print(f"claim {claim}", *tables(found[str(claim)]), sep="\n\n")
    harness.save(path, "cpu", claims={key: found[key] for key in sorted(found, key=int)})


def tables(found: Mapping) -> Iterator[str]:
    """What was measured of a claim, as tables in Markdown."""
    for name, part in found.items():
        if isinstance(part, Mapping):
            yield from (f"{name}: {text}" for text in tables(part))
            continue
        for kind in dict.fromkeys(row.get("iou") for row in part):
            rows = [row for row in part if row.get("iou") == kind]
            yield f"{name} {kind or ''}\n\n{markdown(rows) if kind else plain(rows)}"


def plain(rows: Sequence[Mapping]) -> str:
    """Rows as they are; a pair is a mean and its deviation."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        lines.append(["{} ± {}".format(*v) if isinstance(v, list) else str(v) for v in row.values()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(rows: Sequence[dict]) -> str:
    """Means, and below them the differences with their intervals, bold where they leave out zero."""
    names = list(rows[0]["mean"])
    lines = [["", "seeds", *names], ["---"] * (2 + len(names))]
    for row in rows:
        lines.append([f"`{row['way']}`", str(len(row["seeds"])), *(f"{row['mean'][n]:.1f}" for n in names)])
        if "difference" in row:
            cells = []
            for delta, low, high in row["difference"].values():
                text = f"{delta:+.1f} [{low:+.1f}, {high:+.1f}]"
                cells.append(f"**{text}**" if low > 0 or high < 0 else text)
            lines.append([f"− `{row['against']}`", "", *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=["list", "train", "measure"])
    options.add_argument("--claims", nargs="+", type=int, choices=sorted(MEASURES), default=list(MEASURES))
    options.add_argument("--seeds", nargs="+", type=int, default=list(range(SEEDS)))
    options.add_argument("--root", type=Path, default=Path("runs/claims"))
    options.add_argument("--quickstart", type=Path, default=Path("runs/quickstart/best.pt"), help="to begin with")
    options.add_argument("--samples", type=int, default=300, help="bootstrap draws of the pictures")
    options.add_argument("--pictures", type=int, default=40, help="on which models are looked at")
    options.add_argument("--repeats", type=int, default=3, help="of timings")
    options.add_argument("--json", type=Path, default=harness.RESULTS / "claims.json")
    args = options.parse_args()
    torch.set_num_threads(1)
    trained = [claim for claim in CLAIMS if claim in args.claims]
    if args.part == "list":
        print(listing(args.root, trained, args.seeds))
    elif args.part == "train":
        train_missing(args.root, trained, args.seeds, args.quickstart)
    else:
        measure(args)


if __name__ == "__main__":
    main()
