"""Hydra entry points whose configuration is checked, key by key, before anything runs; see schema.py."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detector.checkpoint import new_name
from detector.config.multirun import Multirun
from detector.config.schema import check
from detector.config.suggest import CONFIGS, compose, explain, hydra_options, leaves, list_options
from detector.config.typed import MULTIRUN, as_typed
from detector.ops.checks import ConfigError, RunError
from detector.ops.text import readable_streams

TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user wants to see where errors come from


@dataclass
class Split:
    """Keys of data.train and data.val."""

    images: str
    annotations: str


@dataclass
class Data:
    """Keys of configs/data."""

    root: str
    prepare: str | None
    train: Split
    val: Split
    masks: bool
    keypoints: bool
    mask_size: int
    keep_empty: bool
    on_error: Literal["raise", "skip"]
    max_pixels: int
    cache: str | None
    group_by_aspect: bool
    pad_multiple: int
    pad_to: tuple[int, int] | None


def entry_point(config_name: str, keys: type) -> Callable:
    """Decorator: a function of the checked config becomes a Hydra program, whose --help is the function's docstring.

    Args:
        config_name: the primary config in configs/.
        keys: a dataclass (or callable) whose arguments are the allowed top-level keys.
    """

    expected = (ConfigError, RunError, OmegaConfBaseException)

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        started = False
        multirun = Multirun()

        @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
        def app(cfg: DictConfig) -> Any:
            nonlocal started
            started = True
            readable_streams()  # again: a job of a cluster starts here
            mine = HydraConfig.get()
            if mine.mode == RunMode.MULTIRUN:  # Hydra goes on with the next job if one fails
                if multirun.records is None:  # asked for in a way that MULTIRUN does not know, such as --multi
                    multirun.open(mine.sweep.dir)
                with multirun.job(mine.job.num, list(mine.overrides.task), cfg.get("run_dir"), expected) as job:
                    prepare(cfg, mine, keys)
                    value = task(cfg)
                    job.value = value if isinstance(value, float) else None
                    return value
            try:
                prepare(cfg, mine, keys)
                return task(cfg)
            except expected as error:
                give_up(str(error), 1 if isinstance(error, RunError) else 2, error)

        @functools.wraps(task)
        def main() -> None:
            nonlocal started
            started = False
            readable_streams()
            if {"--help", "-h"} & set(sys.argv[1:]):
                return print(f"{inspect.getdoc(task)}\n{list_options(config_name, sys.argv[1:])}")
            os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come out as they are: Hydra's own report exits with 1
            sys.argv[1:] = as_typed(sys.argv[1:])
            try:
                name, folders = hydra_options(sys.argv[1:])
                if MULTIRUN & set(sys.argv):
                    hydras = [text for text in sys.argv[1:] if text.startswith("hydra")]
                    multirun.open(compose(name or config_name, hydras, folders).hydra.sweep.dir)
                app()
            except Exception as error:
                if not (started or multirun.jobs):  # the jobs of a cluster start elsewhere
                    give_up(explain(error, config_name, sys.argv[1:]), 2, error)
                if not multirun.failed:
                    raise
            finally:  # after a signal, too
                failed = multirun.failed
                multirun.report()
            if failed:
                raise SystemExit(1)

        return main

    return decorate


def prepare(cfg: DictConfig, hydras: DictConfig, keys: type | None = None) -> None:
    """Make of a composed config what a program works with, and check it; see `check` and `share_roi`."""
    rename_targets(cfg)
    check_heads(hydras)
    share_roi(cfg, hydras)
    check(cfg, keys)


def rename_targets(cfg: DictConfig) -> None:
    """Let configs of the user's own go on naming classes where they were before."""
    for key in leaves(cfg):
        if key.endswith("._target_") and (name := OmegaConf.select(cfg, key)) != new_name(name):
            OmegaConf.update(cfg, key, new_name(name))


def check_heads(hydras: DictConfig) -> None:
    """Refuse an option of `heads` for a model that it has no file for: Hydra would leave the model's own heads."""
    choices = hydras.runtime.choices
    heads, model = choices.get("heads"), choices.get("model")
    fitted = {file.stem.removeprefix(f"{heads}_") for file in files(hydras, f"heads/fit/{heads}_*")}
    if fitted and model not in fitted:
        raise ConfigError(
            f"heads={heads} model={model}: there are no such heads for this model; the models that have some are "
            f"{', '.join(sorted(fitted))}. Take one of them, or heads=full with the sizes set key by key"
        )


def files(hydras: DictConfig, pattern: str) -> list[Path]:
    """The YAML files below the folders that configs come from; those of a project that uses this one among them."""
    folders = [source.path for source in hydras.runtime.config_sources if source.schema == "file"]
    return [file for folder in folders for file in sorted(Path(folder).glob(f"{pattern}.yaml"))]


def share_roi(cfg: DictConfig, hydras: DictConfig) -> None:
    """Give what is set of `roi`, such as roi.gamma=0.2, to every head that has the same RoI method.

    What a head sets for itself stays. Hydra alone would put it into cfg.roi, which no head reads. `hydras`: Hydra's own
    node, which says whence the configs come and which option of each group was chosen.
    """
    choices = hydras.runtime.choices
    if "roi" not in cfg or "model" not in cfg:
        return
    usual = OmegaConf.load(files(hydras, f"roi/{choices.roi}")[0])
    heads = [name for name in cfg.model if isinstance(cfg.model.get(name), DictConfig)]  # null: left away
    for name in [name for name in heads if choices.get(f"roi@model.{name}.roi") == choices.roi]:
        head, shared = cfg.model[name], copy.deepcopy(cfg.roi)
        for key in leaves(head.roi):
            value = OmegaConf.select(head.roi, key)
            if not isinstance(value, DictConfig) and value != OmegaConf.select(usual, key):
                OmegaConf.update(shared, key, value, force_add=True)
        head.roi = shared


def give_up(message: str, code: int, error: Exception) -> NoReturn:
    """End the program with one message; HYDRA_FULL_ERROR=1 shows where the error comes from."""
    if TRACEBACKS:
        raise error
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def override_folder(ignore: Sequence[str] = ()) -> str:
    """'/roi=pool,seed=1': what the command line changed, as a folder name; '' if nothing.

    No clock and no process id, so that all ranks agree and a second start finds the first one's run. `ignore` names
    keys, and whole sections, that do not change the result.
    """
    if not HydraConfig.initialized():
        return ""
    task = HydraConfig.get().overrides.task
    parts = [text for text in task if text.lstrip("+~").partition("=")[0].split(".")[0].split("@")[0] not in ignore]
    name = re.sub(r"[^\w.,=+@~-]", "_", ",".join(sorted(parts)))
    if len(name) > 120:
        name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"/{name}" if name else ""


def overridden() -> set[str]:
    """The keys that the command line sets, such as 'model.rpn.min_size'."""
    if not HydraConfig.initialized():
        return set()
    return {text.lstrip("+~").partition("=")[0] for text in HydraConfig.get().overrides.task}


OmegaConf.register_new_resolver(
    "override_folder", lambda *ignore: override_folder(ignore), replace=True, use_cache=False
)
