"""Look a data set over before time is spent on it.

    detector validate data=custom data.root=my_data

Takes what `detector train` takes and looks at the data that it would train on, with its image sizes and anchors
(experiment=finetune where data are given and no experiment). Prints what it finds and a command line with the settings
that suit the data, and writes report.json and report.html with pictures. One step is trained to measure memory and
time. Exit codes: 0 nothing that would stop a run, 1 errors, 2 a setting cannot work or there is no data set to look at.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import html
import io
import json
import math
import os
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import cv2
import hotcoco
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from detector.commands import advice
from detector.commands.copies import SAME_PICTURE, Looks, agreement, alike, fitted, look_of
from detector.commands.train import train
from detector.comparison import report as pages
from detector.config import ConfigError, as_typed, build, compose, config_errors, explain, make_folder
from detector.config.program import prepare
from detector.config.suggest import hydra_options
from detector.data import Annotations, CocoDataset, Pipeline, build_dataset
from detector.data.annotations import Images, Objects, Truth
from detector.data.loader import build_transforms, split_files
from detector.data.outlines import cover
from detector.data.read_coco import Problems
from detector.data.several import shown
from detector.engine import memory, setup
from detector.evaluation.coco import for_backend
from detector.evaluation.evaluator import ground_truth
from detector.evaluation.tables import table
from detector.inference.draw import draw
from detector.ops.text import one_line, readable_streams
from detector.roi import RoIExtractor, assign_levels
from detector.runtime import data_workers
from detector.settings import LVIS_LIMIT
from detector.weights.zoo import implied

COUNTED = ("objects", "images")
COPIES_SHOWN = 6  # pictures side by side
SHOWN_CATEGORIES = 100  # at once
KEPT, DRAWN = "model.box_head.detections_per_image", "model.box_head.batch_size_per_image"
SHOWN = 10  # examples that a finding names
SIZES = (0, 8, 16, 32, 64, 96, 128, 256, 512, np.inf)  # limits of the histogram, sqrt(area) in network pixels


@dataclass
class Finding:
    severity: str  # "error": stops a run or spoils the evaluation; "warning": to be looked at
    split: str
    what: str
    count: int
    examples: list[str]


@dataclass
class Report:
    findings: list[Finding] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    pictures: list[tuple[str, np.ndarray]] = field(default_factory=list)
    suggestions: dict[str, str] = field(default_factory=dict)  # settings as the command line has them
    advice: list[str] = field(default_factory=list)  # what they are for
    looked_at: str = ""  # the training for which
    command: str = ""  # that starts it with all suggestions

    def add(self, severity: str, split: str, what: str, examples: Iterable[Any], count: int | None = None) -> None:
        """count: how many there are, where `examples` are not all of them."""
        examples = list(map(str, examples))
        if examples:
            self.findings.append(Finding(severity, split, what, count or len(examples), examples[:SHOWN]))

    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


def validate(
    *overrides: str,
    config_dir: str | Path | None = None,
    images: bool = True,
    pictures: int = 6,
    step: bool = False,
    suggest: bool = True,
) -> Report:
    """The report on the data set that `detector train` with these overrides would train on, with the command line to
    train with: `validate("data=custom", "data.root=my_data")`.

    Args:
        overrides: as on the command line; with data of one's own and no experiment, that of experiment=finetune.
        config_dir: a folder with config options of one's own.
        images: whether the image files are read. pictures: how many examples are drawn for each split.
        step: whether one step is trained, where nothing is wrong, to measure memory and time.
        suggest: whether sizes and settings are proposed.

    Raises ConfigError for overrides that are none, and as the training does before it opens the data.
    """
    given = list(overrides)
    chosen = [text.partition("=")[0] for text in given]
    if "data" in chosen and "experiment" not in chosen:  # the recipe for data of one's own
        given.insert(0, "experiment=finetune")
    typed = as_typed(given)
    typed += implied(typed)
    place = ["--config-dir", str(config_dir)] if config_dir else []
    try:
        cfg = compose("train", typed, hydra_options(typed + place)[1])
    except Exception as error:
        raise ConfigError(explain(error, "train", typed + place)) from error
    hydras, cfg = cfg.hydra, OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    prepare(cfg, hydras, train)
    report = report_on(cfg, images=images, pictures=pictures, step=step, suggest=suggest)
    choices = hydras.runtime.choices
    report.looked_at = f"experiment={choices.experiment} model={choices.model} data={choices.data}"
    kept = [text for text in given if text.partition("=")[0] not in report.suggestions]
    proposed = [f"{key}={value}" for key, value in report.suggestions.items()]
    report.command = shlex.join(["detector", "train", *place, *kept, *proposed])
    return report


def report_on(
    cfg: DictConfig, images: bool = True, pictures: int = 6, step: bool = False, suggest: bool = True
) -> Report:
    """`validate` of a whole training configuration.

    The data are opened as the training opens them, with the same settings; what is wrong is an error where it would
    stop the training, and a warning where data.on_error=skip leaves it out.
    """
    training, evaluation = build(cfg.training, "training"), build(cfg.evaluation, "evaluation")
    report, sets = Report(), {}
    check_statistics(report, cfg)
    setup.preflight(cfg, training)
    wrong = "error" if cfg.data.on_error == "raise" else "warning"
    for split in ("train", "val"):
        problems = Problems(shown(split_files(cfg.data, split)[1]))
        options = {"categories": sets["train"].categories if "train" in sets else None, "problems": problems}
        try:
            with config_errors("data"):
                sets[split] = build_dataset(cfg.data, split, cfg.augment, seed=cfg.seed, truth=True, **options)
        except ConfigError as error:
            report.add("error", split, "the data set cannot be used", [error])
        for (is_error, kind), places in problems.found.items():
            report.add(wrong if is_error else "warning", split, kind, places.examples, places.count)
    if len(sets) == 2 and not report.has_errors():
        try:
            setup.fit(cfg, sets["train"], sets["val"], evaluation)
        except ConfigError as error:
            report.add("error", "both", "model, settings and data do not fit", [error])
    for split, dataset in sets.items():
        look_at_objects(report, split, dataset.annotations)
        look_with_hotcoco(report, split, dataset.annotations.truth)
    look_at_crowds(report, cfg, {split: dataset.annotations for split, dataset in sets.items()})
    if sets:
        look_at_sizes(report, cfg, {split: dataset.annotations for split, dataset in sets.items()}, suggest)
    digests, looks = {}, {}
    for split, dataset in sets.items():
        if images:
            digests[split], looks[split], histograms = look_at_images(report, split, dataset, wrong)
            if split == "train" and histograms.any():
                add_statistics(report, cfg, histograms)
        report.pictures += examples(split, dataset, pictures)
    if len(sets) == 2:
        compare_splits(report, digests)
        if looks:
            look_for_copies(report, sets, looks)
    if "val" in sets and suggest:
        look_at_noise(report, ground_truth(sets["val"]))
    if step and "train" in sets and not report.has_errors():
        look_at_a_step(report, cfg, sets["train"])
    report.findings.sort(key=lambda finding: finding.severity)
    return report


def check_statistics(report: Report, cfg: DictConfig) -> None:
    """Where the model lacks the pixel statistics of its channels, which this command measures, say so and put some in
    their place."""
    for key, usual in (("pixel_mean", 127.5), ("pixel_std", 64.0)):
        given = cfg.model.get(key)
        if given is not None and len(given) == 3 != cfg.data.channels:
            what = f"model.{key} has 3 numbers, data.channels={cfg.data.channels}: give those that are measured below"
            report.add("error", "train", what, [f"model.{key}={list(given)}"])
            cfg.model[key] = [usual] * cfg.data.channels


def add_statistics(report: Report, cfg: DictConfig, histograms: np.ndarray) -> None:
    """Mean and standard deviation of each channel, from the counts [C, 256] of its numbers in the training images."""
    share = histograms / histograms.sum(axis=1, keepdims=True)
    mean = share @ np.arange(256)
    std = np.sqrt((share * (np.arange(256) - mean[:, None]) ** 2).sum(axis=1)).clip(min=1)  # a channel may be empty
    values = {"pixel_mean": mean.round(3).tolist(), "pixel_std": std.round(3).tolist()}
    report.statistics["train"] |= {"pixel mean": values["pixel_mean"], "pixel standard deviation": values["pixel_std"]}
    if cfg.data.channels != 3 or cfg.data.intensity is not None:
        report.suggestions |= {
            f"model.{key}": f"[{','.join(f'{v:g}' for v in numbers)}]" for key, numbers in values.items()
        }


def look_at_objects(report: Report, split: str, found: Annotations) -> None:
    """Counts, masks that disagree with boxes, crowded images."""
    per_image = np.diff(found.object_starts)
    objects = ~found.crowd
    images_of = np.repeat(np.arange(len(found)), per_image)
    report.statistics[split] = {
        "images": len(found),
        "images without objects": int((per_image == 0).sum()),
        "objects": int(objects.sum()),
        "crowd regions": int(found.crowd.sum()),
        "objects with a mask": int((np.diff(found.ring_starts) > 0).sum()),
        "most objects in an image": int(per_image.max()),
        "per category": {
            name: {
                "objects": int((own := objects & (found.labels == label)).sum()),
                "images": len(np.unique(images_of[own])),
            }
            for label, name in enumerate(found.categories, 1)
        },
    }
    outlined = np.flatnonzero(np.diff(found.ring_starts) > 0)
    if len(outlined):
        first = found.point_starts[found.ring_starts[outlined]]
        bounds = np.concatenate(
            [np.minimum.reduceat(found.points, first), np.maximum.reduceat(found.points, first)], axis=1
        )
        height, width = found.image_sizes[images_of[outlined]].T
        bounds = bounds.clip(0, np.stack([width, height, width, height], axis=1))
        boxes = found.boxes[outlined]
        side = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
        wrong = np.abs(bounds - boxes).max(axis=1) > np.maximum(2, 0.05 * side)
        report.add(
            "warning",
            split,
            "bbox and segmentation disagree by more than 2 px and a twentieth of the object",
            (
                f"annotation {found.object_ids[i]} ({named(found, images_of[i])}): "
                f"bbox {boxes[k].round(1).tolist()}, around the segmentation {bounds[k].round(1).tolist()}"
                for k, i in enumerate(outlined)
                if wrong[k]
            ),
        )
    # the same box, label and image twice: the second can never be found
    keys = np.column_stack([images_of, found.labels, found.boxes.round(1)])
    _, inverse, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    again = np.flatnonzero(counts[inverse.ravel()] > 1)
    report.add(
        "warning",
        split,
        "the same box and category again in an image",
        (f"annotation {found.object_ids[i]} ({named(found, images_of[i])})" for i in again),
    )


def named(found: Images, row: int) -> str:
    """What a finding calls an image."""
    return f"image {found.image_ids[row]}, {found.file_name(row)}"


def look_at_crowds(report: Report, cfg: DictConfig, sets: Mapping[str, Annotations]) -> None:
    """Images with more objects than the box head keeps or AP counts, and the settings that reach all."""
    federated = any(found.truth is not None and found.truth.federated for found in sets.values())
    kept, counted = OmegaConf.select(cfg, KEPT), LVIS_LIMIT if federated else cfg.evaluation.max_detections[-1]
    most, of_class, crowded = 0, 0, {}
    for split, found in sets.items():
        images_of = np.repeat(np.arange(len(found)), np.diff(found.object_starts))[~found.crowd]
        objects = np.bincount(images_of, minlength=len(found))
        _, of_classes = np.unique(np.stack([images_of, found.labels[~found.crowd]]), axis=1, return_counts=True)
        most, of_class = max(most, objects.max()), max(of_class, of_classes.max(initial=0))
        crowded[split] = [(named(found, i), objects[i]) for i in np.argsort(-objects, kind="stable")]
    limit = counted if kept is None else min(kept, counted)
    enough = 100 * math.ceil(1.5 * most / 100)  # what is found twice or wrongly takes places, too
    if kept is not None and most > kept:
        report.suggestions[KEPT] = str(enough)
    if of_class > counted and not federated:
        report.suggestions["evaluation.max_detections"] = f"[1,10,{enough}]"
    advice = " ".join(f"{key}={value}" for key, value in report.suggestions.items())
    for split, images in crowded.items() if advice else ():
        where = (f"{image}: {count}" for image, count in images if count > limit)
        what = f"image with more than {limit} objects, the most that are kept or counted; images hold up to {most}"
        report.add("warning", split, f"{what}: {advice}", where)


def look_with_hotcoco(report: Report, split: str, truth: Truth) -> None:
    """hotcoco's own health check of what evaluation compares with. What it finds wrong does not stop a run."""
    content, _ = for_backend(truth, [])
    with contextlib.redirect_stdout(io.StringIO()):
        checked = hotcoco.COCO(content).healthcheck()
    images, images_of = np.argsort(truth.image_ids), truth.images_of()
    for item in [*checked["errors"], *checked["warnings"]]:
        code, ids = item["code"], np.array(item["affected_ids"], int) - 1
        if "category" in code:
            where = (f"category {truth.categories[i]!r}" for i in ids)
        elif "image" in code or "dimensions" in code:
            where = (named(truth, images[i]) for i in ids)
        else:
            where = (f"annotation {truth.object_ids[i]} ({named(truth, images_of[i])})" for i in ids)
        report.add("warning", split, f"{code.replace('_', ' ')} (hotcoco: {item['message']})", where)


def look_at_sizes(report: Report, cfg: DictConfig, sets: Mapping[str, Annotations], suggest: bool) -> None:
    """Objects against anchors and pyramid levels, at the size at which the network sees them; the training set's give
    the settings that are proposed."""
    model = setup.skeleton(cfg)
    rpn = build(cfg.model.rpn, "model.rpn")(model.neck.out_channels, model.neck.strides)  # with numbers in its anchors
    transforms = Pipeline(build_transforms(cfg.augment, "val"))
    for split, found in sets.items():
        boxes, sizes = network_boxes(found, transforms)
        side = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
        counts = np.histogram(side, SIZES)[0]
        names = [f"{low:g} to {high:g} px" for low, high in zip(SIZES, SIZES[1:])]
        statistics = report.statistics[split]
        statistics["size as the network sees it, sqrt(area)"] = dict(zip(names, counts.tolist()))
        best = advice.best_anchor_iou(boxes, sizes, rpn.anchors)
        statistics["best anchor"] = {
            f"IoU below {rpn.negative_iou}": int((best < rpn.negative_iou).sum()),
            f"IoU below {rpn.positive_iou}": int((best < rpn.positive_iou).sum()),
            "of objects": len(best),
        }
        if split == "train" and len(boxes) and suggest:
            propose_sizes(report, cfg, found, boxes, sizes, side.numpy())
            propose_rois(report, cfg, found)
        if len(best) and (unmatched := float((best < rpn.negative_iou).float().mean())) > 0.01:
            keys = (key for key in report.suggestions if key.startswith(("model.rpn.", "augment.")))
            what = " ".join(f"{key}={report.suggestions[key]}" for key in keys) or "other objects than the training set"
            report.add(
                "warning",
                split,
                f"no anchor overlaps {unmatched:.1%} of the objects by IoU {rpn.negative_iou}: {what}",
                (f"{w:.0f} x {h:.0f} px" for w, h in (boxes[:, 2:] - boxes[:, :2])[best < rpn.negative_iou]),
            )
        extractor = next((part for part in model.modules() if isinstance(part, RoIExtractor)), None)
        if extractor is None:  # the RPN alone
            continue
        rule = (extractor.strides, extractor.canonical_level, extractor.canonical_size, extractor.level_rule)
        levels = torch.bincount(assign_levels(boxes, *rule), minlength=len(extractor.strides)).tolist()
        statistics["pyramid level of the box head"] = {
            f"stride {stride:g}": count for stride, count in zip(extractor.strides, levels)
        }


def propose_sizes(
    report: Report, cfg: DictConfig, found: Annotations, boxes: Tensor, sizes: Tensor, side: np.ndarray
) -> None:
    """The size of images, and then the anchors at that size, where others suit the objects clearly better."""
    factor, edge = 1.0, cfg.augment.get("short_edge")
    if edge is not None and (proposal := advice.propose_edge(side, found.image_sizes, edge)):
        wanted, why = proposal
        factor = wanted / edge
        report.suggestions |= {"augment.short_edge": str(wanted)}
        report.suggestions["augment.max_size"] = str(round(cfg.augment.max_size * factor))
        report.advice.append(f"augment.short_edge={wanted}, not {edge}: {why}")
    model = setup.skeleton(cfg)
    rpn = OmegaConf.to_container(cfg.model.rpn)
    shapes = list(model.neck.strides), rpn["anchor_sizes"], rpn["aspect_ratios"]
    now, best = advice.propose_anchors(boxes * factor, (sizes * factor).round().long(), *shapes)
    where = f"reach {now.reached:.0%} of the objects by IoU {advice.REACHED}, {now.iou:.2f} on average"
    if best.reached > now.reached + 0.02 or best.iou > now.iou + 0.03:
        own = {"anchor_sizes": advice.bracketed(best.sizes), "aspect_ratios": advice.bracketed(best.ratios)}
        own = {f"model.rpn.{key}": value for key, value in own.items()}
        report.suggestions |= own
        line = " ".join(f"{key}={value}" for key, value in own.items())
        report.advice.append(f"the anchors {where}; {line} reach {best.reached:.0%}, {best.iou:.2f}")
    else:
        report.advice.append(f"the anchors {where}: as well as others would")


def propose_rois(report: Report, cfg: DictConfig, found: Annotations) -> None:
    """More RoIs of an image in the losses, where an image has more objects than RoIs of objects enter them."""
    rois, share = (
        OmegaConf.select(cfg, f"model.box_head.{key}") for key in ("batch_size_per_image", "positive_fraction")
    )
    if rois is None or share is None:  # the RPN alone, a head of one's own
        return
    images_of = np.repeat(np.arange(len(found)), np.diff(found.object_starts))[~found.crowd]
    objects = len(images_of) / len(np.unique(images_of))
    if more := advice.propose_rois(objects, rois, share):
        report.suggestions[DRAWN] = str(more)
        report.advice.append(
            f"{DRAWN}={more}, not {rois}: images with objects have {objects:.1f} of them on average, and only "
            f"{int(share * rois)} RoIs of objects enter the losses; with more an iteration learns more and takes longer"
        )


FEW_TO_DRAW = 10  # objects, of fewer of which draws say nothing


def look_at_noise(report: Report, truth: Truth) -> None:
    """Whether the validation set is large enough for its AP to say something."""
    objects = int((~truth.crowd).sum())
    if len(truth) >= advice.FEW_IMAGES and objects >= advice.FEW_OBJECTS:
        return
    if (found := advice.noise(truth)) is not None:
        value, low, high = (100 * number for number in found)
        told = (
            f"a detector of AP {value:.0f} is measured as {low:.0f} to {high:.0f} (95 %), {high - low:.0f} points wide"
        )
        width = f": {told}" if objects >= FEW_TO_DRAW else ""
        report.add(
            "warning",
            "val",
            f"AP on {len(truth)} images with {objects} objects is mostly chance{width}. Give it {advice.FEW_IMAGES} "
            f"images and {advice.FEW_OBJECTS} objects: detector convert split",
            [f"{len(truth)} images, {objects} objects"],
        )


def look_at_a_step(report: Report, cfg: DictConfig, dataset: CocoDataset) -> None:
    """One step of the training, for the batch that fits and the time that an epoch takes."""
    step = memory.measure_step(cfg, dataset)
    workers, wanted = data_workers(torch.device(step.device), cfg.runtime.workers), cfg.training.batch_size
    epoch = advice.span(step.epoch(len(dataset), workers))
    report.statistics["one step"] = {
        f"images on {step.device}": step.images,
        "s": round(step.seconds, 2),
        "s to load an image": round(step.loading, 3),
        "MB for an image": round(step.per_image),
        "MB for the model": round(step.fixed),
    }
    report.advice.append(f"an epoch of {len(dataset)} images takes about {epoch} on {step.device}")
    if wanted == "auto":  # finds out by itself
        return
    batch, fits = wanted // cfg.training.accumulate, step.batch()
    room = f"{step.per_image:.0f} MB for an image and {step.fixed:.0f} MB for the model, {step.free:.0f} MB are free"
    usual = cfg.training.reference_batch or cfg.training.batch_size
    if fits < batch:
        report.suggestions["training.batch_size"] = str(fits)
        report.advice.append(f"training.batch_size={fits}, not {batch}: more do not fit ({room})")
    elif step.device.startswith("cuda") and (more := min(fits, usual, len(dataset))) >= 2 * batch:
        report.suggestions["training.batch_size"] = str(more)
        report.advice.append(f"training.batch_size={more}, not {batch}: they fit ({room}), and take less time")


def network_boxes(found: Annotations, transforms: Pipeline) -> tuple[Tensor, Tensor]:
    """Boxes [M, 4] and sizes (height, width) [M, 2] of their images as the network sees them, crowd left out."""
    sizes = {}
    for height, width in np.unique(found.image_sizes, axis=0).tolist():
        sizes[height, width] = transforms(np.zeros((height, width, 3), np.uint8)).image.shape[:2]
    after = np.array([sizes[tuple(size)] for size in found.image_sizes.tolist()])
    images_of = np.repeat(np.arange(len(found)), np.diff(found.object_starts))[~found.crowd]
    scale = (after / found.image_sizes)[images_of][:, ::-1]
    boxes = found.boxes[~found.crowd] * np.tile(scale, 2)
    return torch.from_numpy(boxes).float(), torch.from_numpy(after[images_of])


def look_at_images(
    report: Report, split: str, dataset: CocoDataset, wrong: str
) -> tuple[dict[str, list[str]], Looks, np.ndarray]:
    """Decode every image; returns their names by content, and how they look. wrong: severity of an image that
    cannot be read."""

    histograms = np.zeros((dataset.pictures.channels, 256), np.int64)
    several, lock = [], Lock()

    def look(index: int) -> tuple[str | None, str | None, tuple[int, int] | None]:
        path, page = dataset.image_path(index), dataset.page(index)
        try:
            digest = hashlib.blake2b(path.read_bytes() + repr(page).encode(), digest_size=16).hexdigest()
        except OSError as error:
            return None, str(error), None
        try:
            image = dataset.read(index)
            pages = dataset.pictures.check(path).pages if page is None and dataset.pictures.page is None else 1
        except (OSError, ValueError) as error:
            return digest, str(error), None
        counts = [np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(image.shape[2])]
        with lock:
            np.add(histograms, counts, out=histograms)
            if pages > 1:
                several.append(f"{dataset.name_of(dataset.rows[index])}: {path} has {pages}")
        return digest, None, look_of(dataset.pictures.rgb(image))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        looked = pool.map(look, range(len(dataset)))
        results = list(tqdm(looked, total=len(dataset), desc=f"read {split}", disable=None))
    report.add(wrong, split, "image that cannot be read, or is of another size", (e for _, e, _ in results if e))
    by_content = defaultdict(list)
    for row, (digest, *_) in zip(dataset.rows, results):
        if digest:
            by_content[digest].append(named(dataset.annotations, row))
    report.add(
        "warning", split, "the same image again", ("; ".join(names) for names in by_content.values() if names[1:])
    )
    seen = [(index, look) for index, (_, _, look) in enumerate(results) if look is not None]
    hashes = np.array([look for _, look in seen], np.uint64).reshape(-1, 2)
    report.add("warning", split, "file of several pages, of which the first is taken: data.page chooses", several)
    return by_content, Looks(np.array([index for index, _ in seen], int), hashes), histograms


def look_for_copies(report: Report, sets: Mapping[str, CocoDataset], looks: Mapping[str, Looks]) -> None:
    """Pictures of val that are in train too though their files differ: saved anew, resized or mirrored. What looks
    alike in short is compared at one size, and shown side by side."""
    if not len(looks["val"].hashes) or not len(looks["train"].hashes):
        report.advice.append(
            "copies of pictures that were saved anew, resized or mirrored: pip install imagehash finds them"
        )
        return
    found = []
    for indices in alike(looks["val"], looks["train"]):
        pair, mirrored = {"val": indices[0], "train": indices[1]}, indices[2]
        if len({sets[split].image_path(index).read_bytes() for split, index in pair.items()}) == 1:
            continue  # the same file: told already
        images = [sets[split].pictures.rgb(sets[split].read(index)) for split, index in pair.items()]
        if agreement(images[0], images[1][:, ::-1] if mirrored else images[1]) < SAME_PICTURE:
            continue
        names = {split: sets[split].file_names()[sets[split].rows[index]] for split, index in pair.items()}
        found.append(f"train {names['train']}, val {names['val']}{', mirrored' if mirrored else ''}")
        if len(found) <= COPIES_SHOWN:
            report.pictures.append((f"copy: {found[-1]}", np.concatenate(list(map(fitted, images)), axis=1)))
    what = "picture of val that looks like one of train (saved anew, resized or mirrored): the evaluation is too good"
    report.add("warning", "both", what, found)


def compare_splits(report: Report, digests: Mapping[str, Mapping]) -> None:
    train, val = (report.statistics[split]["per category"] for split in ("train", "val"))
    for one, other, names in (("train", "val", (train, val)), ("val", "train", (val, train))):
        lacking = [name for name, own in names[0].items() if own["objects"] and not names[1][name]["objects"]]
        report.add("warning", "both", f"category with objects in {one} but none in {other}", lacking)
    if digests:
        both = sorted(digests["train"].keys() & digests["val"].keys())
        report.add(
            "warning",
            "both",
            "image of val that is in train too: the evaluation is too good",
            ("; ".join(f"{s}: {', '.join(digests[s][key])}" for s in ("train", "val")) for key in both),
        )


def examples(split: str, dataset: CocoDataset, count: int) -> list[tuple[str, np.ndarray]]:
    """Titles and pictures of evenly spaced images with their objects."""
    pictures = []
    for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int):
        with contextlib.suppress(OSError, ValueError):
            objects = dataset.annotations.objects(dataset.rows[index])
            image = dataset.pictures.rgb(dataset.read(index))
            masks = object_masks(objects, *image.shape[:2])
            options = {"masks": masks, "keypoints": objects.keypoints}
            picture = draw(image, objects.boxes, objects.labels, dataset.categories, **options)
            scale = min(1, 800 / max(picture.shape))
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            name = dataset.file_names()[dataset.rows[index]]
            pictures.append((f"{split} image {dataset.image_ids[index]}: {name}", picture))
    return pictures


def object_masks(objects: Objects, height: int, width: int) -> np.ndarray | None:
    """[G, height, width] bool of the outlines; None where none of the objects has one."""
    if not len(objects.outlines.points):
        return None
    boxes = np.tile([0, 0, width, height], (len(objects.boxes), 1))
    return cover(objects.outlines, boxes, max(height, width))[:, :height, :width] > 0.5


def as_json(report: Report) -> dict[str, Any]:
    about = {"looked_at": report.looked_at, "command": report.command}
    about |= {"suggestions": report.suggestions, "advice": report.advice}
    return {"findings": [asdict(finding) for finding in report.findings], "statistics": report.statistics, **about}


def as_text(report: Report) -> str:
    """For the terminal."""
    lines = []
    for split, numbers in report.statistics.items():
        plain = ", ".join(f"{value} {name}" for name, value in numbers.items() if not isinstance(value, dict))
        lines.append(f"{split}: {plain}")
    per_category = {name: own["per category"] for name, own in report.statistics.items() if "per category" in own}
    if per_category:
        names = list(dict.fromkeys(name for own in per_category.values() for name in own))
        rows = [
            [one_line(name), *(str(own.get(name, {}).get(key, 0)) for own in per_category.values() for key in COUNTED)]
            for name in names[:SHOWN_CATEGORIES]
        ]
        lines.append(table(["category", *(f"{split} {key}" for split in per_category for key in COUNTED)], rows))
        if len(names) > SHOWN_CATEGORIES:
            lines.append(f"... and {len(names) - SHOWN_CATEGORIES} more, in the report")
    for finding in report.findings:
        lines.append(one_line(f"{finding.severity.upper()} {finding.split}: {finding.count} x {finding.what}"))
        lines += [f"    {one_line(example)}" for example in finding.examples[:3]]
    lines += [f"- {one_line(text)}" for text in report.advice]
    if measured := [f"{k}={v}" for k, v in report.suggestions.items() if k.startswith("model.pixel_")]:
        lines.append(f"to train with: {shlex.join(measured)}")
    totals = Counter(finding.severity for finding in report.findings)
    if report.looked_at:
        lines.append(f"looked at for {report.looked_at}")
    if report.command and not totals["error"]:
        lines.append(f"train with all suggestions:\n    {report.command}")
    lines.append(f"{totals['error']} kinds of errors, {totals['warning']} of warnings")
    return "\n".join(lines)


STYLE = """
.totals { font-size: 1.05rem; }
.totals strong { padding: .1rem .5rem; border-radius: 1rem; border: 1px solid var(--rule); }
details { border: 1px solid var(--rule); border-left: 5px solid var(--soft); border-radius: 6px; margin: .5rem 0;
  background: var(--shade); overflow-wrap: anywhere; } details.error { border-left-color: var(--c1); }
details.warning { border-left-color: var(--c4); } summary { cursor: pointer; padding: .45rem .8rem; }
summary strong { text-transform: capitalize; } details ul { margin: 0; padding: .2rem 1rem .7rem 2.4rem; }
details table { margin: 0 .8rem .7rem; } pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem 1rem;
  background: var(--shade); border: 1px solid var(--rule); border-radius: 6px; }
.bars { width: 100%; } .bars td { border: 0; padding: .1rem .5rem .1rem 0; white-space: normal; }
.bars td:first-child { width: 32%; overflow-wrap: anywhere; } .bars td:nth-child(2) { width: 40%; }
.bars td:last-child { text-align: left; } .bars div { background: var(--c0); height: .8em; border-radius: 2px; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); }
.pictures figure { margin: 0; } .pictures img { width: 100%; border-radius: 4px; }
figcaption { overflow-wrap: anywhere; }
"""


def as_html(report: Report) -> str:
    """A page that needs nothing else; every text that comes from the data is escaped."""
    totals = Counter(finding.severity for finding in report.findings)
    parts = ["<h1>Data set</h1>"]
    counted = " ".join(f"<strong>{totals[kind]} {kind}s</strong>" for kind in ("error", "warning"))
    parts.append(f'<p class="totals">Kinds of findings: {counted}</p>')
    for finding in report.findings:
        items = "".join(f"<li>{html.escape(example)}</li>" for example in finding.examples)
        text = f"<strong>{finding.severity}</strong>, {finding.split}: {finding.count} × {html.escape(finding.what)}"
        shown = " open" * (finding.severity == "error")
        parts.append(f'<details class="{finding.severity}"{shown}><summary>{text}</summary><ul>{items}</ul></details>')
    advice = "".join(f"<p>{html.escape(text)}</p>" for text in report.advice)
    if report.command and not report.has_errors():
        advice += f"<p>For {html.escape(report.looked_at)}:</p><pre>{html.escape(report.command)}</pre>"
    parts.append(pages.section("What suits the data", advice))
    for split, numbers in report.statistics.items():
        plain = ", ".join(f"{value} {name}" for name, value in numbers.items() if not isinstance(value, dict))
        tables = [(bars(value), name) for name, value in numbers.items() if isinstance(value, dict)]
        parts.append(pages.section(split, f"<p>{html.escape(plain)}</p>{pages.charts(*tables, broad=True)}"))
    figures = "".join(pages.figure(title, picture) for title, picture in report.pictures)
    parts.append(pages.section("Examples", f'<div class="pictures">{figures}</div>' if figures else ""))
    return pages.document("Data set", parts, STYLE)


def bars(numbers: Mapping[str, Any]) -> str:
    """A table of counts, or of objects and the images that hold them; of many the rest can be unfolded."""
    counts = {name: value["objects"] if isinstance(value, dict) else value for name, value in numbers.items()}
    most, rows = max(counts.values(), default=0) or 1, []
    for name, value in numbers.items():
        text = f"{counts[name]} in {value['images']} images" if isinstance(value, dict) else counts[name]
        bar = f'<div style="width:{100 * counts[name] / most:.1f}%"></div>'
        rows.append(f"<tr><td>{html.escape(name)}</td><td>{bar}</td><td>{text}</td></tr>")
    first, rest = rows[:SHOWN_CATEGORIES], rows[SHOWN_CATEGORIES:]
    table_of = '<table class="bars"><tbody>{}</tbody></table>'
    more = f"<details><summary>{len(rest)} more</summary>{table_of.format(''.join(rest))}</details>" if rest else ""
    return table_of.format("".join(first)) + more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for `detector train`: data=..., data.root=..., experiment=...")
    parser.add_argument("--config-dir", type=Path, help="a folder with config options of your own")
    parser.add_argument("--output", type=Path, default=Path("runs/validation"), help="folder of the report")
    parser.add_argument("--no-step", action="store_true", help="do not train a step to measure memory and time")
    parser.add_argument("--no-images", action="store_true", help="do not read the image files")
    options = parser.parse_intermixed_args()  # options may stand between overrides
    readable_streams()
    looks = {"images": not options.no_images, "step": not (options.no_step or options.no_images)}
    try:
        make_folder(options.output, "--output")
        report = validate(*options.overrides, config_dir=options.config_dir, **looks)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    (options.output / "report.json").write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
    (options.output / "report.html").write_text(as_html(report), encoding="utf-8", errors="backslashreplace")
    print(f"{as_text(report)}\n{options.output}: report.json, report.html")
    sys.exit(int(report.has_errors()))


if __name__ == "__main__":
    main()
