"""Messages for what Hydra cannot compose: which override it stumbled over, and what may have been meant."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from detector.config.schema import find_target, near

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def explain(error: Exception, config_name: str, overrides: Sequence[str]) -> str:
    """Which override Hydra stumbled over and what it may have meant; else Hydra's own words on one line."""
    try:
        found = culprit(config_name, overrides)
    except Exception:
        found = None  # the files themselves do not compose
    return found or " ".join(str(error).split())


def culprit(config_name: str, overrides: Sequence[str]) -> str | None:
    """The first override that names what does not exist."""
    groups: dict[str, list[str]] = {}
    for file in sorted(CONFIGS.glob("*/**/*.yaml")):
        groups.setdefault(file.parent.relative_to(CONFIGS).as_posix(), []).append(file.stem)
    choices, values = [], []
    for text in overrides:
        if text.startswith("-") or not ("=" in text or text.startswith("~")):
            continue  # Hydra's own options
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as problem:
            return f"{text}: {' '.join(str(problem).split())}"
        if not override.key_or_group.startswith("hydra/"):  # has options of plugins beside ours
            (choices if override.key_or_group in groups else values).append((text, override))
    for text, override in choices:
        options = groups[override.key_or_group]
        for option in re.split(r"[,\[\]]", text.partition("=")[2].strip("'\"")):
            if option and option not in ("null", "choice") and option.strip() not in options:
                others = f"{near(option, options)} There are: {', '.join(options)}"
                return f"{override.key_or_group}={option}: configs/{override.key_or_group} has no {option!r}{others}"
    known = compose(config_name)
    slots = [slot.removeprefix("/") for slot in known.hydra.runtime.choices if not slot.startswith("hydra/")]
    for text, _ in choices:
        slot = text.lstrip("+~").partition("=")[0]
        if "@" in slot and slot not in slots:
            return f"{text}: no {slot!r} in this configuration{near(slot, slots)} There are: {', '.join(slots)}"
    single = [text for text, _ in choices if "," not in text]
    known = compose(config_name, single)
    names = leaves(known) + slots
    for text, override in values:
        key = override.key_or_group
        if override.is_add() or key.startswith("hydra"):
            continue
        if key not in names:
            if key.rpartition(".")[2] in arguments_of(known, key.rpartition(".")[0]):
                return f"{text}: {key} has no value yet; add one with +{text}"
            return f"{text}: there is no {key!r}{near(key, names)}"
    return None


def arguments_of(cfg: DictConfig, path: str) -> list[str]:
    """What the callable of the node at `path` takes."""
    target = OmegaConf.select(cfg, f"{path}._target_") if path else None
    return list(inspect.signature(find_target(target, path)).parameters) if target else []


def compose(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The composed config without running it, Hydra's own node included."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(config_name, list(overrides), return_hydra_config=True)


def leaves(node: Any, path: str = "") -> list[str]:
    """All dotted keys of a config, Hydra's own left out."""
    keys = []
    for key in node if isinstance(node, DictConfig) else ():
        if path or key != "hydra":
            name = f"{path}.{key}" if path else str(key)
            child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
            keys += [name, *leaves(child, name)]
    return keys
