"""Hydra entry points whose configuration is checked, key by key, before anything runs; see schema.py."""

from __future__ import annotations

import copy
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from detector.checkpoint import new_name
from detector.config.multirun import watcher
from detector.config.schema import check
from detector.config.suggest import CONFIGS, explain, hydra_options, leaves, list_options
from detector.config.typed import as_typed
from detector.ops.checks import ConfigError, RunError
from detector.ops.text import readable_streams

TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user wants to see where errors come from


def as_program(
    config_name: str,
    command: Callable[..., Any],
    description: str,
    implied: Callable[[Sequence[str]], list[str]] = lambda overrides: [],
) -> Callable[[], None]:
    """A command as a Hydra program: the keys at the top of its config are the command's arguments, checked by name and
    type against its signature before it is called with their values.

    Args:
        config_name: the primary config in configs/.
        description: what --help prints.
        implied: the overrides that those of the command line bring along.
    """

    expected = (ConfigError, RunError, OmegaConfBaseException)
    started = False
    multirun = watcher()

    @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
    def app(cfg: DictConfig) -> Any:
        nonlocal started
        started = True
        readable_streams()  # again: a job of a cluster starts here
        mine = HydraConfig.get()
        if mine.mode == RunMode.MULTIRUN:  # Hydra goes on with the next job if one fails
            if multirun.records is None:  # a primary config of one's own that does not name the callback
                multirun.open(mine.sweep.dir)
            with multirun.job(mine.job.num, list(mine.overrides.task), cfg.get("run_dir"), expected) as job:
                prepare(cfg, mine, command)
                value = start(command, cfg)
                job.value = value if isinstance(value, float) else None
                job.metric = OmegaConf.select(cfg, "evaluation.metric")
                return value
        try:
            prepare(cfg, mine, command)
            return start(command, cfg)
        except expected as error:
            give_up(str(error), 1 if isinstance(error, RunError) else 2, error)

    def main() -> None:
        nonlocal started
        started = False
        readable_streams()
        if {"--help", "-h"} & set(sys.argv[1:]):  # before Hydra, whose help has no examples and no options of groups
            return print(f"{main.__doc__}\n{list_options(config_name, sys.argv[1:])}")
        os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come out as they are: Hydra's own report exits with 1
        sys.argv[1:] = as_typed(sys.argv[1:])
        try:
            hydra_options(sys.argv[1:])  # refuses what Hydra would pass over
            sys.argv += implied(sys.argv[1:])
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

    main.__doc__ = inspect.cleandoc(description)
    return main


def start(command: Callable[..., Any], cfg: DictConfig) -> Any:
    """Call a command with the values of its config."""
    return command(**OmegaConf.to_container(cfg, resolve=True))


def prepare(cfg: DictConfig, hydras: DictConfig, command: Callable | None = None) -> None:
    """Make of a composed config what a program works with, and check it; see `check` and `share_roi`."""
    rename_targets(cfg)
    check_heads(hydras)
    share_roi(cfg, hydras)
    check(cfg, command)


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
    slots = [slot for slot, choice in choices.items() if slot.startswith("roi@model.") and choice == choices.roi]
    for slot in slots:
        head, shared = OmegaConf.select(cfg, slot.removeprefix("roi@").removesuffix(".roi")), copy.deepcopy(cfg.roi)
        if head is None:  # left away
            continue
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
    """'-roi=pool,seed=1': what the command line changed, as the end of a folder's name; '' if nothing.

    Runs lie side by side: none in another's folder, which may be moved and deleted for itself. No clock and no process
    id, so that all ranks agree and a second start finds the first one's run. `ignore` names keys, and whole sections,
    that do not change the result.
    """
    if not HydraConfig.initialized():
        return ""
    task = HydraConfig.get().overrides.task
    parts = [text for text in task if text.lstrip("+~").partition("=")[0].split(".")[0].split("@")[0] not in ignore]
    name = re.sub(r"[^\w.,=+@~-]", "_", ",".join(sorted(parts)))
    if len(name) > 80:
        name = f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return f"-{name}" if name else ""


def overridden() -> set[str]:
    """The keys that the command line sets, such as 'model.rpn.min_size'."""
    if not HydraConfig.initialized():
        return set()
    return {text.lstrip("+~").partition("=")[0] for text in HydraConfig.get().overrides.task}


OmegaConf.register_new_resolver(
    "override_folder", lambda *ignore: override_folder(ignore), replace=True, use_cache=False
)
