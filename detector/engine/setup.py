"""What surrounds the training loop: data, the checkpoint to continue from, and the last words of a run."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detector.config import ConfigError, build, config_errors, overridden
from detector.config.schema import FILES, near, needed_trust
from detector.data import CocoDataset, Loader, Pictures, build_dataset, build_loader, collate
from detector.data.annotations import ranges
from detector.data.contents import changes, contents
from detector.data.loader import split_files
from detector.engine import run_folder
from detector.engine.evaluation import chosen
from detector.engine.freezing import frozen_parts
from detector.engine.loggers import chosen_loggers
from detector.engine.optimizer import build_optimizer, trained_by
from detector.engine.state import Run, State
from detector.evaluation.fit import check_training, rehearse
from detector.evaluation.operating_point import describe
from detector.evaluation.tables import summary_table
from detector.runtime import chosen_precision, data_workers, set_random_state
from detector.settings import COCO_LIMITS, Evaluation, Training
from detector.structures import Batch, Targets
from detector.threads import number_varies
from detector.weights.start import Weights
from detector.weights.transfer import fills_body

log = logging.getLogger(__name__)
IMAGES = ("data.train.images", "data.val.images")


def preflight(cfg: DictConfig, training: Training) -> None:
    """Build model and optimiser without memory, and look whether there is data: what cannot work is refused at once."""
    hint = f"make it with: {cfg.data.prepare}" if cfg.data.prepare else "set data.root to where your data set is"
    root = Path(cfg.data.root)
    if not root.exists():
        folders = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
        near_by = near(root.name, folders).removesuffix(".")
        raise ConfigError(f"data.root = {cfg.data.root!r} does not exist{near_by}; {hint}")
    for split in ("train", "val"):
        gone = next((path for path in split_files(cfg.data, split)[1] if not path.is_file()), None)
        if gone is not None:
            files = sorted(file.relative_to(root) for depth in ("*", "*/*") for file in root.glob(f"{depth}.json"))
            beside = f", or data.{split}.annotations to one of {', '.join(map(str, files[:5]))}" if files else ""
            raise ConfigError(f"data.{split}.annotations: {gone} does not exist; {hint}{beside}")
    with config_errors("data"):
        Pictures.of(cfg.data)
    chosen_loggers(cfg)
    if cfg.seed < 0:
        raise ConfigError(f"seed = {cfg.seed}: must be at least 0")
    if cfg.runtime.compile and cfg.model.backbone.get("checkpointing"):
        raise ConfigError(
            "model.backbone.checkpointing = True: compiled layers decide themselves what they keep; set it or "
            "runtime.compile to false"
        )
    model = skeleton(cfg)
    optimizer = build_optimizer(build(cfg.optimizer, "optimizer"), model, training)
    frozen_parts(model, training.freeze, trained_by(optimizer))


def skeleton(cfg: DictConfig) -> nn.Module:
    """The model that `cfg` describes, for two classes, without memory."""
    with torch.device("meta"):
        return build(cfg.model, "model", num_classes=2)


def warn_of_random_layers(run: Run, state: State) -> None:
    """Say so if a run begins with layers that no weights fill and that are not trained: nothing good can come of it."""
    model, later = state.model, {id(p) for p in state.parameters}
    still = {name: p for name, p in model.named_parameters() if not p.requires_grad and name not in state.filled}
    frozen = [name for name, p in still.items() if id(p) in later]
    if frozen:
        log.warning(
            "training.freeze: %d tensors (%s, ...) have no weights from elsewhere: they stay random %s. Leave out "
            "their part, or give model.weights=FILE",
            *(len(frozen), frozen[0]),
            "to the end" if run.training.thaw_at is None else f"until iteration {run.thaw_at}",
        )
    frozen = [name.removeprefix("backbone.") for name, p in still.items() if id(p) not in later]
    if frozen and run.cfg.model.backbone.get("weights") is None:
        log.warning(
            "model.backbone.weights = null, but %d of its tensors are not trained (%s, ...): they stay random. Give "
            "model.backbone.weights=IMAGENET1K_V1 or model.weights=FILE, or train from scratch with "
            "model.backbone.frozen_stages=0 model.backbone.norm=batch_norm",
            *(len(frozen), frozen[0]),
        )


def find_checkpoint(run: Run) -> dict[str, Any] | None:
    """The checkpoint to continue from, None for a fresh start.

    Raises ConfigError if it is of a run with other settings, naming them.
    """
    found = run_folder.find(run.cfg.resume, run.folder)
    if found is None:
        log.info("training into %s", run.folder)
    else:
        run_folder.compare_configs(found["config"], run.config, overridden())
        log.info("continuing in %s after iteration %d", run.folder, found["iteration"])
    if run.world.main:
        (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(run.cfg, resolve=True), encoding="utf-8")
    return found


def resume(run: Run, state: State, found: dict[str, Any]) -> None:
    """Put `state` and the random generators where the checkpoint `found` left them."""
    categories = run.train_set.categories
    if found["categories"] != list(categories):
        raise ConfigError(f"the checkpoint's categories are {found['categories']}, the data's {categories}")
    try:
        state.load_state_dict(found)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the checkpoint does not fit the model and optimizer configured: {error}") from error
    if len(found["rng"]) == run.world.size:
        set_random_state(found["rng"][run.world.rank])


def contents_of(run: Run, found: Mapping[str, Any] | None) -> dict[str, Any]:
    """What both data sets hold now. Raises ConfigError if that is not what it was when the checkpoint `found` was made;
    a warning where the user asked to go on: with the path of that checkpoint or, for images, data.on_error=skip."""
    sets = {"train": run.train_set, "val": run.val_set}
    now = {split: contents(dataset) for split, dataset in sets.items()}
    before = found and found.get("contents")  # older checkpoints have none
    if before:
        differing = [line for split in sets for line in changes(before[split], now[split], sets[split], split)]
        wanted = run.cfg.resume not in ("auto", "none")
        serious = [line for line in differing if not line.startswith(IMAGES) or run.cfg.data.on_error == "raise"]
        if serious and not wanted:
            raise ConfigError(
                f"what the run learns from has changed since it began: {'; '.join(serious)}. Bring it back, or give "
                "another run_dir, or resume=none to start anew and overwrite, or "
                f"resume={run.folder / 'last.pt'} to go on with what is there now"
            )
        for line in differing:
            log.warning("changed since the run began: %s", line)
    return now


def is_finished(run: Run, state: State) -> bool:
    """Whether there is nothing left to do, which is said."""
    if not state.is_exhausted(run) and min(state.iteration, state.evaluated) < run.total:
        return False
    more = "Another run_dir, or a longer schedule" if state.iteration >= run.total else "A larger training.patience"
    log.info("%s is finished: %d iterations. %s, trains more.", run.folder, state.iteration, more)
    return True


def introduce(run: Run, state: State, checkpoint: Mapping[str, Any] | None, weights: Weights) -> None:
    """What is going to be trained, on what and with what, before the first step."""
    model, world = state.model, run.world
    training, frozen = run.training, state.frozen.parameters if state.frozen.held else []
    all_of_it, trained, held = (
        sum(p.numel() for p in ps) / 1e6 for ps in (model.parameters(), state.parameters, frozen)
    )
    heads = {name: getattr(model, name) for name in ("box_head", "mask_head", "keypoint_head")}
    heads = {name: head for name, head in heads.items() if head is not None}
    extra: Any = model.extra_heads
    heads |= {f"extra_heads.{name}": head for name, head in extra.items()}
    seen = {name: getattr(head, "stages", [head])[0] for name, head in heads.items()}
    ops = {name: head.extractor.op for name, head in seen.items() if hasattr(head, "extractor")}
    methods = [
        f"{name}: {type(op).__name__}, {op.output_size[0]} x {op.output_size[1]} bins" for name, op in ops.items()
    ]
    parts = [type(part).__name__ for part in (model.backbone, model.neck, model.rpn)]
    wanted, precision = run.runtime.precision, chosen_precision(world.device, run.runtime.precision)
    precision += " (runtime.precision=auto)" if wanted == "auto" else ""
    ranks = f", {world.size} ranks" if world.size > 1 else ""
    most = "up to " if number_varies() else ""
    threads = f", {most}{torch.get_num_threads()} threads" if world.device.type == "cpu" else ""
    used = weights.model is None or not fills_body(model, weights.model.state_dict)
    loaded = [f"{key} = {name}" for key, name in zip(FILES, (weights.name, weights.backbone if used else None)) if name]
    origin = [f"iteration {checkpoint['iteration']} of this run"] if checkpoint else loaded
    rates = sorted({group["initial_lr"] for group in state.optimizer.param_groups if group["initial_lr"]})
    epochs = run.total / run.per_epoch
    lines = {
        "device": f"{world.device}, {precision}{threads}{ranks}",
        "model": ", ".join([*parts, *(type(head).__name__ for head in heads.values())]),
        "RoI methods": "; ".join(methods) or "none",
        "parameters": f"{all_of_it:.2f} M, trained {trained - held:.2f} M",
        "classes": f"{len(run.train_set.categories)}: {', '.join(run.train_set.categories[:10])}"
        + (", ..." if len(run.train_set.categories) > 10 else ""),
        "training": f"{len(run.train_set)} images, {len(run.train_set.annotations.labels)} objects",
        "validation": f"{len(run.val_set)} images, {len(run.val_set.annotations.labels)} objects",
        "length": f"{run.total} iterations of {run.training.batch_size} images, {epochs:.1f} epochs; evaluated every "
        f"{run.evaluate_every}",
        "learning rate": f"{' to '.join(f'{rate:.3g}' for rate in (rates[:1] + rates[1:][-1:]))}, after scaling"
        + (f", each layer of the backbone {training.layer_decay} of the next" if training.layer_decay else ""),
        "frozen": ", ".join(state.frozen.names)
        + (f": {held:.2f} M" if held else "")
        + (f", until iteration {run.thaw_at}" if training.thaw_at is not None else ""),
        "starts from": ", ".join(origin) or "nothing: from scratch",
        "results": str(run.folder),
    }
    log.info("%s", "\n".join(f"{name:14} {text}" for name, text in lines.items() if text))
    for group in state.optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        log.debug("lr %.3g, weight decay %.3g: %d parameters", group["initial_lr"], group["weight_decay"], count)


def about(run: Run, contents: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint tells about its run, for those who use the model and for the run itself when it goes on."""
    return {
        "contents": contents,
        "config": run.config,
        "categories": list(run.train_set.categories),
        "category_ids": list(run.train_set.category_ids),
        "keypoint_names": list(run.train_set.annotations.keypoint_names),
    }


def datasets(cfg: DictConfig) -> tuple[Any, Any]:
    """The training and the validation set; the latter may have no category that the former lacks (matched by name)."""
    with config_errors("data"):
        train_set = build_dataset(cfg.data, "train", cfg.augment, seed=cfg.seed)
        known: Any = {"categories": train_set.categories, "attributes": train_set.annotations.attribute_groups}
        val_set = build_dataset(cfg.data, "val", cfg.augment, seed=cfg.seed, **known)
    return train_set, val_set


def fit(cfg: DictConfig, train_set: Any, val_set: Any, evaluation: Evaluation) -> None:
    """Put the data's number of keypoints and attributes into `cfg` where they are left open, and the number of
    detections that are measured where the box head keeps fewer; refuse what the model cannot learn from the data, and
    what cannot be measured."""
    names = train_set.annotations.keypoint_names
    if names and OmegaConf.select(cfg, "model.keypoint_head.num_keypoints", default=0) is None:
        cfg.model.keypoint_head.num_keypoints = len(names)
    for head in (cfg.model.get("extra_heads") or {}).values():
        if "attributes" in head and head.attributes is None:
            head.attributes = train_set.annotations.attribute_groups
    keep_enough(cfg, evaluation.max_detections[-1])
    model = skeleton(cfg)
    check_training(model, train_set)
    options = {"keypoint_names": names, "where": "evaluation.", "max_detections": evaluation.max_detections}
    with config_errors("evaluation"):
        numbers = rehearse(model, val_set, evaluation.evaluator, None, evaluation.sigmas, **options)
    chosen(numbers, evaluation.metric)
    if (wanted := cfg.training.class_weights) is not None:
        if model.box_head is None:
            raise ConfigError("training.class_weights: this model has no box_head, which tells classes apart")
        named: Any = None if wanted == "auto" else OmegaConf.to_container(wanted)
        OmegaConf.update(cfg, "model.box_head.class_weights", class_weights(train_set, named), force_add=True)


def class_weights(dataset: CocoDataset, named: Mapping[str, float] | None) -> list[float]:
    """The factor on the loss of each class 1..K: of those that are named, others 1; by default 1 / sqrt(objects), so
    scaled that the mean over the objects is 1, and 1 for classes without any."""
    names = list(dataset.categories)
    if named is None:
        found = dataset.annotations
        kept = ranges(found.object_starts, dataset.rows)
        labels = found.labels[kept][~found.crowd[kept]]
        counts = np.bincount(labels, minlength=len(names) + 1)[1:]
        scale = counts.sum() / max(1.0, np.sqrt(counts).sum())
        return [round(float(scale / math.sqrt(count)), 4) if count else 1.0 for count in counts]
    for name in named:
        if name not in names:
            raise ConfigError(f"training.class_weights.{name}: the data have no such class{near(name, names)}")
    return [float(named.get(name, 1.0)) for name in names]


def keep_enough(cfg: DictConfig, limit: int) -> None:
    """Let the box head keep as many detections of an image as evaluation counts, unless the command line says how many;
    there a warning says what is missing."""
    key = "model.box_head.detections_per_image"
    kept = OmegaConf.select(cfg, key)
    if limit <= COCO_LIMITS[-1] or kept is None or kept >= limit:
        return
    if key in overridden():
        log.warning("evaluation.max_detections counts up to %d detections, but %s = %d keeps fewer", limit, key, kept)
        return
    OmegaConf.update(cfg, key, limit)
    log.info("%s = %d, not %d: as many as evaluation.max_detections counts", key, limit, kept)


def loaders(run: Run, iteration: int) -> tuple[Loader, Loader, tuple[Batch, Targets]]:
    """Endless training micro-batches from `iteration` on, the validation batches, and two images to look at."""
    data, training, val_set = run.cfg.data, run.training, run.val_set
    shared = {key: data[key] for key in ("group_by_aspect", "pad_multiple", "pad_to")}
    workers = data_workers(run.world.device, run.runtime.workers)
    shared |= {"workers": workers, "rank": run.world.rank, "world": run.world.size}
    own = {key: data[key] for key in ("sampling", "repeat_threshold")}
    own |= {"seed": run.cfg.seed, "start_position": iteration * training.batch_size}
    with config_errors("training"):
        train_loader = build_loader(run.train_set, training.batch_size // training.accumulate, **own, **shared)
    val_loader = build_loader(val_set, run.evaluation.batch_size, training=False, **shared)
    shown = run.train_set if run.evaluation.tiles.size else val_set  # large pictures are seen in parts alone
    examples = collate([shown[0], shown[len(shown) // 2]], data.pad_multiple)
    return train_loader, val_loader, examples


def finish(run: Run, state: State) -> None:
    """The table, and where to look."""
    own = ",".join(needed_trust(run.config))
    board = "tensorboard" in chosen_loggers(run.cfg)
    curves = f"curves       tensorboard --logdir {run.folder / 'tensorboard'}\n" if board else ""
    trust = own and (f" 'trust=[{own}]'" if "," in own else f" trust={own}")
    log.info(
        "finished after %d iterations, the best at %d\n%s\n%s\n"
        "run          %s  (last.pt, best.pt, metrics.json, log.jsonl)\n%s"
        "predictions  detector predict checkpoint=%s images=PATH%s",
        *(state.iteration, state.best["iteration"], summary_table(state.metrics, run.evaluation.max_detections)),
        f"\n{describe(state.operating_point)}\n" if state.operating_point else "",
        *(run.folder, curves, run.folder / "best.pt", trust),
    )
