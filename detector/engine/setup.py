"""What surrounds the training loop: data, the checkpoint to continue from, and the last words of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..config import ConfigError, config_errors
from ..data import build_dataset, build_loader
from . import checkpoint
from .distributed import World, set_random_state
from .settings import Runtime, Training
from .state import State

log = logging.getLogger(__name__)


def datasets(cfg: DictConfig) -> tuple[Any, Any]:
    """The training and the validation set; they must have the same categories."""
    root = Path(cfg.data.root)
    if not root.exists():
        hint = f"make it with: {cfg.data.prepare}" if cfg.data.prepare else "set data.root to where your data set is"
        raise ConfigError(f"data.root = {str(root)!r} does not exist; {hint}")
    with config_errors("data"):
        train_set = build_dataset(cfg.data, "train", cfg.augment, seed=cfg.seed)
        val_set = build_dataset(cfg.data, "val", cfg.augment, seed=cfg.seed)
    if list(train_set.categories) != list(val_set.categories):
        raise ConfigError(f"data: train has the categories {train_set.categories}, val has {val_set.categories}")
    return train_set, val_set


def loaders(
    cfg: DictConfig, train_set: Any, val_set: Any, state: State, training: Training, runtime: Runtime, world: World
) -> tuple[Iterator, Iterable]:
    """Endless training micro-batches from where the state stands, and the validation batches."""
    shared = {key: cfg.data[key] for key in ("group_by_aspect", "pad_multiple", "pad_to")}
    shared |= {"workers": runtime.workers, "rank": world.rank, "world": world.size}
    position = state.iteration * training.batch_size
    with config_errors("training"):
        batches = build_loader(
            train_set, training.batch_size // training.accumulate, seed=cfg.seed, start_position=position, **shared
        )
    return iter(batches), build_loader(val_set, cfg.evaluation.batch_size, training=False, **shared)


def resume(choice: str, folder: Path, state: State, about: Mapping[str, Any], world: World) -> dict[str, Any] | None:
    """Put `state` where the chosen checkpoint left it; returns the checkpoint, None for a fresh start.

    Raises ConfigError if it is of another run: other settings, other categories.
    """
    saved = checkpoint.find(choice, folder)
    if saved is None:
        log.info("training into %s", folder)
        return None
    checkpoint.compare_configs(saved["config"], about["config"])
    if saved["categories"] != about["categories"]:
        raise ConfigError(f"the checkpoint knows the categories {saved['categories']}, the data {about['categories']}")
    state.load_state_dict(saved)
    if len(saved["rng"]) == world.size:
        set_random_state(saved["rng"][world.rank])
    log.info("continuing in %s after iteration %d", folder, state.iteration)
    return saved


def chosen(metrics: Mapping[str, Mapping[str, float]], name: str) -> float:
    """The number that `evaluation.metric` names; auto: mask AP if it was measured, else box AP."""
    kind, _, key = ("segm" if "segm" in metrics else "bbox", "", "AP") if name == "auto" else name.partition(".")
    if kind not in metrics or key not in metrics[kind]:
        known = [f"{kind}.{key}" for kind, numbers in metrics.items() for key in numbers]
        raise ConfigError(f"evaluation.metric = {name!r}: was not measured; there are {', '.join(known)}")
    return metrics[kind][key]


def finish(state: State, folder: Path, table: str) -> None:
    """metrics.json, and where to look."""
    checkpoint.write_json(state.metrics, folder / "metrics.json")
    log.info(
        "finished after %d iterations, best at %d\n%s\n\n"
        "run          %s  (last.pt, best.pt, metrics.json, log.jsonl)\n"
        "curves       tensorboard --logdir %s\n"
        "predictions  python predict.py checkpoint=%s images=PATH",
        *(state.iteration, state.best["iteration"], table),
        *(folder, folder / "tensorboard", folder / "best.pt"),
    )
