"""What surrounds the training loop: data, the checkpoint to continue from, and the last words of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detector.config import ConfigError, build, config_errors, overridden
from detector.config.schema import needed_trust
from detector.data import Loader, build_dataset, build_loader, collate
from detector.engine import run_folder
from detector.engine.optimizer import build_optimizer
from detector.engine.state import State
from detector.evaluation.tables import summary_table
from detector.runtime import World, set_random_state
from detector.settings import Runtime, Training
from detector.structures import Batch, Targets

log = logging.getLogger(__name__)


def preflight(cfg: DictConfig, training: Training) -> None:
    """Build model and optimiser without memory, and look whether there is data: what cannot work is refused at once."""
    hint = f"make it with: {cfg.data.prepare}" if cfg.data.prepare else "set data.root to where your data set is"
    if not Path(cfg.data.root).exists():
        raise ConfigError(f"data.root = {cfg.data.root!r} does not exist; {hint}")
    for split in ("train", "val"):
        path = Path(cfg.data.root) / cfg.data[split].annotations
        if not path.is_file():
            raise ConfigError(f"data.{split}.annotations: {path} does not exist; {hint}")
    if cfg.seed < 0:
        raise ConfigError(f"seed = {cfg.seed}: must be at least 0")
    model = OmegaConf.to_container(cfg.model, resolve=True)
    model["backbone"].pop("weights", None)
    model.pop("weights", None)
    with torch.device("meta"):
        skeleton = build(model, "model", num_classes=2)
    build_optimizer(build(cfg.optimizer, "optimizer"), skeleton, training)


def warn_of_random_layers(cfg: DictConfig, model: nn.Module) -> None:
    """Say so if a run begins with layers that are random and never trained: nothing good can come of it."""
    frozen = [name for name, p in model.backbone.named_parameters() if not p.requires_grad]
    if frozen and cfg.model.backbone.get("weights") is None:
        log.warning(
            "model.backbone.weights = null, but %d of its tensors are not trained (%s, ...): they stay random. Give "
            "model.backbone.weights=IMAGENET1K_V1 or model.weights=FILE, or train from scratch with "
            "model.backbone.frozen_stages=0 model.backbone.norm=batch_norm",
            *(len(frozen), frozen[0]),
        )


def find_checkpoint(cfg: DictConfig, folder: Path, world: World) -> dict[str, Any] | None:
    """The checkpoint to continue from, None for a fresh start.

    Raises ConfigError if it is of a run with other settings, naming them.
    """
    found = run_folder.find(cfg.resume, folder)
    if found is None:
        log.info("training into %s", folder)
    else:
        run_folder.compare_configs(found["config"], OmegaConf.to_container(cfg, resolve=True), overridden())
        log.info("continuing in %s after iteration %d", folder, found["iteration"])
    if world.main:
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    return found


def resume(found: dict[str, Any], state: State, train_set: Any, world: World) -> None:
    """Put `state` and the random generators where the checkpoint left them."""
    if found["categories"] != list(train_set.categories):
        raise ConfigError(f"the checkpoint's categories are {found['categories']}, the data's {train_set.categories}")
    try:
        state.load_state_dict(found)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the checkpoint does not fit the model and optimizer configured: {error}") from error
    if len(found["rng"]) == world.size:
        set_random_state(found["rng"][world.rank])


def about(cfg: DictConfig, train_set: Any) -> dict[str, Any]:
    """What a checkpoint tells about its run, for those who use the model."""
    return {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "categories": list(train_set.categories),
        "category_ids": list(train_set.category_ids),
    }


def datasets(cfg: DictConfig) -> tuple[Any, Any]:
    """The training and the validation set; the latter may have no category that the former lacks (matched by name)."""
    with config_errors("data"):
        train_set = build_dataset(cfg.data, "train", cfg.augment, seed=cfg.seed)
        val_set = build_dataset(cfg.data, "val", cfg.augment, seed=cfg.seed, categories=train_set.categories)
    return train_set, val_set


def loaders(
    cfg: DictConfig, train_set: Any, val_set: Any, iteration: int, training: Training, runtime: Runtime, world: World
) -> tuple[Loader, Loader, tuple[Batch, Targets]]:
    """Endless training micro-batches from `iteration` on, the validation batches, and two images to look at."""
    shared = {key: cfg.data[key] for key in ("group_by_aspect", "pad_multiple", "pad_to")}
    shared |= {"workers": runtime.workers, "rank": world.rank, "world": world.size}
    position = iteration * training.batch_size
    with config_errors("training"):
        train_loader = build_loader(
            train_set, training.batch_size // training.accumulate, seed=cfg.seed, start_position=position, **shared
        )
    val_loader = build_loader(val_set, cfg.evaluation.batch_size, training=False, **shared)
    examples = collate([val_set[0], val_set[len(val_set) // 2]], cfg.data.pad_multiple)
    return train_loader, val_loader, examples


def finish(cfg: DictConfig, state: State, folder: Path) -> None:
    """The table, and where to look."""
    own = ",".join(needed_trust(OmegaConf.to_container(cfg, resolve=True)))
    trust = own and (f" 'trust=[{own}]'" if "," in own else f" trust={own}")
    log.info(
        "finished after %d iterations, the best at %d\n%s\n\n"
        "run          %s  (last.pt, best.pt, metrics.json, log.jsonl)\n"
        "curves       tensorboard --logdir %s\n"
        "predictions  detector predict checkpoint=%s images=PATH%s",
        *(state.iteration, state.best["iteration"], summary_table(state.metrics)),
        *(folder, folder / "tensorboard", folder / "best.pt", trust),
    )
