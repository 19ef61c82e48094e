"""Hydra entry points whose configuration is checked, key by key, before anything runs.

A config is a tree of `_target_` nodes, each a callable with its keyword arguments. So the signatures are the schema: an
unknown key, a value of the wrong type or a missing choice ends the program at once with one line that names the key,
the value and what was probably meant. Ranges are the callables' own business: they raise ValueError, `build` adds the
path.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import inspect
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NoReturn, Union
from urllib.error import URLError

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from detector.multirun import Multirun

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TRACEBACKS = os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user wants to see where errors come from
MULTIRUN = {"-m", "--multirun", "hydra.mode=MULTIRUN"}
SPECIAL = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
LATER = ("model.num_classes",)  # `???` until the data set's categories are known
# what a checkpoint's config may build: modules of the model, nothing that could act on the machine
MODEL_CODE = ("model", "boxes", "matching", "sampling", "losses", "backbone", "rpn", "roi", "heads")


class ConfigError(ValueError):
    """The configuration or its input cannot work: the message says where and why. Exit code 2."""


class RunError(RuntimeError):
    """The run cannot go on for a reason the user can act on; no traceback is needed. Exit code 1."""


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


def entry_point(config_name: str, keys: type, paths: Collection[str] = ()) -> Callable:
    """Decorator: a function of the checked config becomes a Hydra program.

    Args:
        config_name: the primary config in configs/.
        keys: a dataclass (or callable) whose arguments are the allowed top-level keys.
        paths: keys whose values are taken as they are typed: run folders have '=' and ',' in their names.
    """

    expected = (ConfigError, RunError, OmegaConfBaseException)

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        started = False
        multirun = Multirun()

        @hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=config_name)
        def app(cfg: DictConfig) -> Any:
            nonlocal started
            started = True
            mine = HydraConfig.get()
            share_roi(cfg, mine)
            if mine.mode == RunMode.MULTIRUN:  # Hydra goes on with the next job if one fails
                if multirun.records is None:  # asked for in a way that MULTIRUN does not know, such as --multi
                    multirun.open(mine.sweep.dir)
                with multirun.job(mine.job.num, list(mine.overrides.task), cfg.get("run_dir"), expected) as job:
                    check(cfg, keys)
                    value = task(cfg)
                    job.value = value if isinstance(value, float) else None
                    return value
            try:
                check(cfg, keys)
                return task(cfg)
            except expected as error:
                give_up(str(error), 1 if isinstance(error, RunError) else 2, error)

        @functools.wraps(task)
        def main() -> None:
            nonlocal started
            started = False
            os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come out as they are: Hydra's own report exits with 1
            sys.argv[1:] = [quoted(text, paths) for text in sys.argv[1:]]
            try:
                if MULTIRUN & set(sys.argv):
                    hydras = [text for text in sys.argv[1:] if text.startswith("hydra")]
                    multirun.open(compose(config_name, hydras).hydra.sweep.dir)
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


def share_roi(cfg: DictConfig, hydras: DictConfig) -> None:
    """Give what is set of `roi`, such as roi.gamma=0.2, to every head that has the same RoI method.

    What a head sets for itself stays. Hydra alone would put it into cfg.roi, which no head reads. `hydras`: Hydra's own
    node, which says whence the configs come and which option of each group was chosen.
    """
    choices = hydras.runtime.choices
    if "roi" not in cfg or "model" not in cfg:
        return
    folders = [source.path for source in hydras.runtime.config_sources if source.schema == "file"]
    files = [file for folder in folders if (file := Path(folder, "roi", f"{choices.roi}.yaml")).exists()]
    usual = OmegaConf.load(files[0])
    for name in [name for name in cfg.model if choices.get(f"roi@model.{name}.roi") == choices.roi]:
        head, shared = cfg.model[name], copy.deepcopy(cfg.roi)
        for key in leaves(head.roi):
            value = OmegaConf.select(head.roi, key)
            if not isinstance(value, DictConfig) and value != OmegaConf.select(usual, key):
                OmegaConf.update(shared, key, value, force_add=True)
        head.roi = shared


def quoted(text: str, paths: Collection[str]) -> str:
    """An override of a key in `paths` with its value in quotes, unless it is a list, empty, null or quoted already."""
    key, equals, value = text.partition("=")
    if key not in paths or not equals or value in ("", "null") or value[0] in "['\"":
        return text
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def give_up(message: str, code: int, error: Exception) -> NoReturn:
    """End the program with one message; HYDRA_FULL_ERROR=1 shows where the error comes from."""
    if TRACEBACKS:
        raise error
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def build(node: Any, path: str, **arguments: Any) -> Any:
    """Instantiate a `_target_` node; its ValueError, TypeError and OSError become a ConfigError with its path."""
    with config_errors(path):
        return hydra.utils.instantiate(node, _convert_="all", **arguments)


@contextlib.contextmanager
def config_errors(path: str) -> Iterator[None]:
    """Errors of constructors in this context become a ConfigError that names the config node `path`."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, OSError, InstantiationException) as error:
        key = re.search(r"full_key: (\S+)", str(error)) if isinstance(error, InstantiationException) else None
        cause = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ConfigError) or not isinstance(cause, (ValueError, TypeError, OSError)):
            raise cause from error
        where = path if key is None else key[1] if key[1].split(".")[0] == path else f"{path}.{key[1]}"
        hint = "; a download failed: get the file elsewhere and give its path" if isinstance(cause, URLError) else ""
        raise ConfigError(f"{where}: {cause}{hint}") from error


# ----------------------------------------------------------------------------------------------------------- the check


def check(cfg: DictConfig, keys: Callable | None = None) -> None:
    """Compare every key and value of `cfg` with the signature of the callable that will get it.

    Raises ConfigError at the first that does not fit, naming its path, its value and near matches.
    """
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    for key in sorted(OmegaConf.missing_keys(cfg)):
        if key not in LATER:
            raise ConfigError(f"{key} has no value: give it, for example `{key}=...` on the command line")
    if keys is not None:
        check_arguments(tree, keys, "", "the configuration")
    check_nodes(tree, "")


def check_nodes(node: Any, path: str) -> None:
    """Check all `_target_` nodes at and below `node`."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict) and "_target_" in node:
        target = find_target(node["_target_"], path)
        check_arguments({k: v for k, v in node.items() if k not in SPECIAL}, target, path, node["_target_"])
    for key, value in children:
        check_nodes(value, f"{path}.{key}" if path else str(key))


def find_target(name: Any, path: str) -> Callable:
    """The callable that a `_target_` names."""
    try:
        target = pkgutil.resolve_name(name)
    except Exception as error:
        module, _, leaf = str(name).rpartition(".")
        names = vars(sys.modules[module]) if module in sys.modules else ()
        raise ConfigError(f"{path}._target_ = {name!r}: cannot be imported ({error}){near(leaf, names)}") from error
    if not callable(target):
        raise ConfigError(f"{path}._target_ = {name!r}: is not callable")
    return target


def check_arguments(arguments: dict, target: Callable, path: str, name: str) -> None:
    """Check that `target` takes these keyword arguments and that their types fit its annotations."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (ValueError, TypeError):
        return  # built-ins without a signature
    try:
        hints = typing.get_type_hints(inspect.unwrap(target.__init__ if inspect.isclass(target) else target))
    except Exception:
        hints = {}  # annotations that only exist for type checkers
    known = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters)
    for key, value in arguments.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            if open_ended:
                continue
            raise ConfigError(f"{where}: {name} has no {key!r}{near(key, known)} It has: {', '.join(known)}")
        default = known[key].default
        bare = known[key].annotation is inspect.Parameter.empty and isinstance(default, (bool, int, float, str))
        hint = hints.get(key, type(default) if bare else Any)
        if value == "???" or value is default or value == default:
            continue
        if not fits(value, hint):
            wanted = re.sub(r"(typing|collections\.abc|torch)\.([a-z.]+\.)?", "", inspect.formatannotation(hint))
            raise ConfigError(f"{where} = {value!r}: {name} takes {wanted} here, not {type(value).__name__}")
        if is_dataclass(hint) and "_target_" not in value:
            check_arguments(value, hint, where, where)


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value is right for a type annotation; annotations that YAML cannot express fit everything."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin is typing.Annotated:
        return fits(value, args[0])
    kind = origin or hint
    if kind is type(None) or value is None:
        return value is None and kind in (type(None), Any, object, None)
    if kind in (bool, int, str):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float) and value == value
    if kind in (list, tuple, set, frozenset, Sequence, Iterable, Collection):
        if not isinstance(value, list):
            return False
        if kind is tuple and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(fits, value, args))
        return not args or all(fits(item, args[0]) for item in value)
    if kind in (dict, Mapping):
        return isinstance(value, dict) and (len(args) < 2 or all(fits(item, args[1]) for item in value.values()))
    if kind is Callable:
        return isinstance(value, dict) and "_target_" in value
    if kind in (Any, object) or not inspect.isclass(kind):
        return True
    if issubclass(kind, (os.PathLike, Enum, torch.dtype, torch.device)):
        return isinstance(value, str)
    return isinstance(value, dict) and (is_dataclass(kind) or "_target_" in value)


def near(name: Any, options: Iterable[Any]) -> str:
    """'; did you mean a, b?' or '.'"""
    matches = difflib.get_close_matches(str(name), {str(option): None for option in options}, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else "."


def check_model_config(node: Any, path: str = "model") -> None:
    """Refuse a stored model config whose `_target_`s reach beyond model code, before anything of it is imported.

    Allowed are callables of the detector's model packages, and nn.Module classes of torch, torchvision and timm.
    """
    ours = tuple(f"detector.{part}." for part in MODEL_CODE)
    check_stored(node, path, "a part of a model", ours, ("torch.nn.", "torchvision.", "timm."), nn.Module)


def check_transforms_config(node: Any, path: str = "augment.val") -> None:
    """Refuse stored transforms that are anything else than the detector's or albumentations' transform classes."""
    import albumentations

    kinds = (albumentations.BasicTransform, albumentations.BaseCompose)
    check_stored(node, path, "a transform", (), ("detector.data.", "albumentations."), kinds)


def check_stored(node: Any, path: str, what: str, ours: tuple, others: tuple, kinds: type | tuple) -> None:
    """Refuse every `_target_` that is neither a callable defined in the detector under a name that starts with one of
    `ours`, nor a class of `kinds` under one of `others`; and interpolations, which could make targets later."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict) and "_target_" in node:
        name = str(node["_target_"])
        target = find_target(name, path) if name.startswith(ours + others) else None
        is_kind = inspect.isclass(target) and issubclass(target, kinds)
        is_ours = name.startswith(ours) and str(getattr(target, "__module__", "")).startswith("detector.")
        if not (is_kind or is_ours):
            raise ConfigError(f"{path}._target_ = {name!r}: not {what}; this config is not trusted")
    if isinstance(node, str) and "${" in node:
        raise ConfigError(f"{path} = {node!r}: a stored config holds values only; this one is not trusted")
    for key, value in children:
        check_stored(value, f"{path}.{key}", what, ours, others, kinds)


# ------------------------------------------------------------------------------ messages for what Hydra cannot compose


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


# ----------------------------------------------------------------------------------------------------- run directories


def make_folder(path: str | Path, key: str) -> Path:
    """The folder that the setting `key` names, made if need be; ConfigError where nothing can be written."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = "" if os.access(folder, os.W_OK) else "Permission denied"
    except OSError as error:
        problem = error.strerror
    if problem:
        raise ConfigError(f"{key} = {str(path)!r}: nothing can be written there ({problem}); choose another folder")
    return folder


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
