"""Finished training runs, gathered into methods: runs that differ in nothing but the seed are one method."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from detector.checkpoint import flatten, with_new_names
from detector.config import CONFIGS, ConfigError
from detector.data.annotations import Truth
from detector.data.file_names import find_in_folders
from detector.data.loader import split_files
from detector.data.places import Folder, as_places
from detector.data.read_coco import read_json
from detector.data.several import as_paths, shown
from detector.data.store import cache_of, contents_key, open_truth
from detector.evaluation.coco import check_predictions
from detector.inference.load import merge
from detector.settings import COCO_LIMITS, UNLEARNT

# what may differ between the runs of one method, and says nothing about it
IRRELEVANT = {"seed", *UNLEARNT}
OFFSET_WEIGHT = "model.offset_loss_weight"
HEADS = ("model.box_head.roi", "model.mask_head.roi", "model.keypoint_head.roi")


class Unusable(ValueError):
    """Why a run cannot be compared."""


@dataclass
class Run:
    """A finished run: what it was, what it learnt, what it found on which validation set."""

    folder: Path
    config: dict
    checkpoint: Path
    truth: tuple[Path, ...]  # annotation files, and as many image folders
    images: tuple[Folder, ...]
    predictions: list[dict] = field(repr=False)
    log: list[dict] = field(repr=False)
    data: dict = field(default_factory=dict, repr=False)  # the settings that the validation set was read with
    limits: tuple[int, ...] = COCO_LIMITS  # max_detections of its evaluation

    @property
    def seed(self) -> Any:
        return self.config.get("seed")


@dataclass
class Method:
    """The runs of one configuration, ordered by seed. settings: the keys in which the methods differ."""

    label: str
    settings: dict[str, Any]
    runs: list[Run]

    @property
    def seeds(self) -> list:
        return [run.seed for run in self.runs]


def find_folders(patterns: str | Sequence[str]) -> list[Path]:
    """The run folders that paths and patterns name, and those one level below a folder that is no run itself."""
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        paths = [Path(pattern)] if Path(pattern).exists() else [Path(p) for p in sorted(glob(pattern))]
        folders = [p for path in paths for p in ([path] if is_run(path) else sorted(path.glob("*/")))]
        folders = [p for p in folders if is_run(p)]
        if not folders:
            raise ConfigError(f"runs: {pattern!r} names no run (a folder with config.yaml, as train.py leaves it)")
        found |= dict.fromkeys(folders)
    return list(found)


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def read_run(folder: Path, checkpoint: str, evaluate=None) -> Run:
    """The run in a folder. Raises Unusable with the reason if it cannot be compared.

    checkpoint: "last" or "best". Its detections are those of eval.py; of the last one else those that training left.
    evaluate: called with the checkpoint's path if there are none; None: that is a reason to refuse the run.
    """
    try:
        config = with_new_names(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise Unusable(f"its record cannot be read: {error}") from None
    if not any(key.startswith("model.box_head.") for key in flatten(config)):
        raise Unusable("its model has no box head: its proposals are of no class")
    if not (folder / "metrics.json").exists():
        done = max((entry.get("iteration", 0) for entry in log), default=0)
        raise Unusable(f"it is not finished: there is no metrics.json, and its log ends at iteration {done}")
    weights, results = folder / f"{checkpoint}.pt", folder / f"eval_{checkpoint}"
    by_training = checkpoint == "last" and (folder / "predictions.json").exists()
    by_eval = (results / "about.json").exists() and (results / "predictions.json").exists()
    if not by_eval and not by_training:
        if not weights.exists():
            raise Unusable(f"it has neither {results.name}/predictions.json nor {weights.name} to make it from")
        if evaluate is None:
            raise Unusable(f"it has no {results.name}/predictions.json: run: detector eval checkpoint={weights}")
        try:
            evaluate(weights)
        except (ValueError, OSError, RuntimeError) as error:
            raise Unusable(f"{weights.name} cannot be evaluated: {error}") from error
    try:
        data = config.get("data") or {}
        limits = (config.get("evaluation") or {}).get("max_detections")
        if by_eval or not by_training:
            about = read_json(results / "about.json", "evaluation")
            data = merge(data, about.get("settings", {}).get("data") or {})
            limits = about.get("max_detections", limits)
            truth, images = as_paths(about["annotations"]), as_places(about["images"], cache=data.get("cache"))
        else:
            results = folder
            images, truth = map(tuple, split_files(data, "val"))
            images *= len(truth) if len(images) == 1 else 1
        predictions = read_json(results / "predictions.json", "prediction")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise Unusable(f"its evaluation cannot be read: {error}") from None
    if gone := next((path for path in truth if not path.exists()), None):
        raise Unusable(f"its validation annotations {gone} are gone")
    return Run(folder, config, weights, truth, images, predictions, log, data, tuple(limits or COCO_LIMITS))


def same_validation_set(runs: Sequence[Run]) -> tuple[list[Run], dict[Path, str]]:
    """The runs on the validation set that most have, and why the others are left out. Files are compared by content."""
    digests = [contents_key(run.truth, cache_of(run.truth, run.data.get("cache"))) for run in runs]
    usual = Counter(digests).most_common(1)[0][0]
    kept = [run for run, digest in zip(runs, digests) if digest == usual]
    others = {
        run.folder: f"it was evaluated on {shown(run.truth)}, the others on {shown(kept[0].truth)}" for run in runs
    }
    return kept, {run.folder: others[run.folder] for run, digest in zip(runs, digests) if digest != usual}


def validation_truth(run: Run) -> Truth:
    """The truth of a run's validation set as its evaluation saw it: with data.on_error=skip without the records that
    were wrong and the images that are missing. Raises ConfigError if it cannot be used."""
    names = ("masks", "on_error", "max_pixels", "keypoints", "cache")
    try:
        truth = open_truth(run.truth, **{name: run.data[name] for name in names if name in run.data})
    except ValueError as error:
        raise ConfigError(f"runs: their validation set cannot be used: {error}") from error
    # a run that ends where something is wrong has seen all of it
    if run.data.get("on_error") != "skip" or not all(folder.is_dir() for folder in run.images):
        return truth
    paths, _, _ = find_in_folders(run.images, truth.sources, truth.all_file_names())
    return truth.select(np.flatnonzero([path is not None for path in paths]))


def fitting(runs: Sequence[Run], truth: Truth) -> tuple[list[Run], dict[Path, str]]:
    """The runs whose predictions are COCO results for their validation set, and what is wrong with the others."""
    kept, wrong = [], {}
    for run in runs:
        try:
            check_predictions(run.predictions, truth)
            kept.append(run)
        except (ValueError, TypeError) as error:
            wrong[run.folder] = f"its predictions cannot be used: {error}"
    return kept, wrong


def group(runs: Sequence[Run]) -> tuple[list[Method], dict[Path, str]]:
    """Methods in the order of their first runs, and why runs were left out: a seed that a method already has."""
    flat = [relevant(run) for run in runs]
    keys = sorted({key for config in flat for key in config})
    values = {key: {repr(c.get(key)) for c in flat if key in c or key != OFFSET_WEIGHT} for key in keys}
    differing = [key for key in keys if len(values[key]) > 1]
    groups: dict[str, list[tuple[Run, dict]]] = {}
    for run, config in zip(runs, flat):
        settings = {key: config[key] for key in differing if key in config}
        groups.setdefault(repr(settings), []).append((run, settings))
    methods, left_out = [], {}
    for members in groups.values():
        by_seed: dict[Any, Run] = {}
        for run, _ in members:
            if run.seed in by_seed:
                left_out[run.folder] = f"it repeats {by_seed[run.seed].folder}: the same settings and seed"
            else:
                by_seed[run.seed] = run
        chosen = [by_seed[seed] for seed in sorted(by_seed, key=repr)]
        methods.append(Method(label(members[0][0].config, members[0][1]), members[0][1], chosen))
    repeated = Counter(method.label for method in methods)
    for number, method in enumerate(methods, 1):
        if repeated[method.label] > 1:
            method.label = f"{method.label} ({number})"
    return methods, left_out


def relevant(run: Run) -> dict[str, Any]:
    """The settings of a run, {dotted key: value}, that can make a difference, precision among them."""
    found = {k: v for k, v in flatten(run.config).items() if not {k, k.split(".")[0]} & IRRELEVANT}
    found["runtime.precision"] = lookup(run.config, "runtime.precision") or "fp32"
    if run.log and not any("loss_offset" in line for line in run.log):  # its methods learn no offsets
        found.pop(OFFSET_WEIGHT, None)
    return found


def label(config: Mapping, settings: Mapping[str, Any]) -> str:
    """A short name from the settings in which a run differs from others: RoI methods by their config's file name."""
    heads = [*HEADS, *(f"model.extra_heads.{name}.roi" for name in lookup(config, "model.extra_heads") or ())]
    parts, of_roi = [], ("roi.", *(f"{head}." for head in heads))
    if not settings or any(key.startswith(of_roi) for key in settings):
        parts.append(roi_name(config.get("roi")))
        for head in heads:
            node = lookup(config, head)
            if node is not None and node != config.get("roi"):
                parts.append(f"{head.split('.')[-2]}={roi_name(node)}")
    others = [key for key in settings if not key.startswith(of_roi)]
    parts += [f"{key.split('.')[-1]}={settings[key]}" for key in others[:4]]
    return ", ".join(parts + (["..."] if len(others) > 4 else []))


def lookup(config: Mapping, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def roi_name(node: Mapping | None) -> str:
    """The file of configs/roi that says the same as this node, else the nearest with what differs from it; of a method
    that has none there, its class with all settings."""
    if not isinstance(node, Mapping):
        return "none"
    known = {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted((CONFIGS / "roi").glob("*.yaml"))
    }
    same_class = {name: other for name, other in known.items() if other.get("_target_") == node.get("_target_")}
    if not same_class:
        name = str(node.get("_target_")).rpartition(".")[2]
        text = ", ".join(f"{key}={value}" for key, value in sorted(node.items()) if not key.startswith("_"))
        return f"{name}({text})" if text else name

    def changes(name: str) -> dict:
        other = same_class[name]
        return {key: node.get(key) for key in {*node, *other} if node.get(key) != other.get(key)}

    best = min(same_class, key=lambda name: len(changes(name)))
    text = ", ".join(f"{key}={value}" for key, value in sorted(changes(best).items()))
    return f"{best}({text})" if text else best
