"""The signatures are the schema: every key and value of a config is compared with the callable that will get it.

A config is a tree of `_target_` nodes, each a callable with its keyword arguments. An unknown key, a value of the wrong
type or a missing choice is named with its path, its value and what was probably meant. Ranges are the callables' own
business: they raise ValueError, `build` adds the path.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union
from urllib.error import URLError

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from detector.checkpoint import flatten
from detector.config.typed import literal
from detector.ops.checks import ConfigError

CONFIGS = (Path(__file__).parents[1] / "configs").resolve()  # in the wheel; in a checkout a link to configs/
PARTNERS = {"backbone@model.backbone=vit": "neck@model.neck=simple_pyramid"}  # options that need one of another group
SPECIAL = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
FILES = ("model.weights", "model.backbone.weights")  # what a model starts from: for weights.Start, not for constructors
LATER = ("model.num_classes",)  # `???` until the data set's categories are known
# what a checkpoint's config may build: modules of the model, nothing that could act on the machine
MODEL_CODE = ("model", "ops", "backbone", "rpn", "roi", "heads")
NOT_THE_USERS = {"detector", "torch", "torchvision", "timm", "albumentations", "numpy", *sys.stdlib_module_names}


def build(node: Any, path: str, **arguments: Any) -> Any:
    """Instantiate a `_target_` node; its ValueError, TypeError and OSError become a ConfigError with its path."""
    for key in FILES:
        if key.startswith(f"{path}."):
            node = without(node, key.removeprefix(f"{path}."))
    with config_errors(path):
        return hydra.utils.instantiate(node, _convert_="all", **arguments)


def without(node: Any, key: str) -> Any:
    """A copy of a config node that has no `key`, such as 'backbone.weights'."""
    node = literal(OmegaConf.to_container(node, resolve=True)) if OmegaConf.is_config(node) else node
    first, _, rest = key.partition(".")
    if not isinstance(node, Mapping) or first not in node:
        return node
    kept = {name: value for name, value in node.items() if name != first}
    return kept | {first: without(node[first], rest)} if rest else kept


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


def check(cfg: DictConfig, command: Callable | None = None) -> None:
    """Compare every key and value of `cfg` with the signature of the callable that will get it: those at its top with
    that of `command`.

    Raises ConfigError at the first that does not fit, naming its path, its value and near matches.
    """
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    for key in sorted(OmegaConf.missing_keys(cfg)):
        if key not in LATER:
            raise ConfigError(f"{key} has no value: give it, for example `{key}=...` on the command line")
    if command is not None:
        check_arguments(tree, command, "", "the configuration")
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
        missing = isinstance(error, ModuleNotFoundError) and error.name == str(name).partition(".")[0]
        hint = "; install its project, or put its folder into PYTHONPATH" if missing else near(leaf, names)
        raise ConfigError(f"{path}._target_ = {name!r}: cannot be imported ({error}){hint}") from error
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
    for key in FILES:
        if key.rpartition(".")[0] == path:
            leaf = key.rpartition(".")[2]
            known[leaf] = inspect.Parameter(leaf, inspect.Parameter.KEYWORD_ONLY, default=None)
            hints[leaf] = str | None
    for key, value in arguments.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in known:
            if open_ended:
                continue
            raise ConfigError(f"{where}: {name} has no {key!r}{near(key, known)} It has: {', '.join(known)}")
        default = known[key].default
        bare = known[key].annotation is inspect.Parameter.empty and isinstance(default, (bool, int, float, str))
        hint = hints.get(key, type(default) if bare else Any)
        if value == "???" or value is default or (type(value) is type(default) and value == default):
            continue
        if not fits(value, hint):
            if words := words_of(hint):
                if isinstance(value, list):
                    wrong = next(i for i, item in enumerate(value) if item not in words)
                    raise ConfigError(f"{where}[{wrong}] = {value[wrong]!r}: {name} takes {', '.join(words)} here")
                raise ConfigError(f"{where} = {value!r}: {name} takes a list of {', '.join(words)} here")
            if isinstance(value, str) and (CONFIGS / key / f"{value}.yaml").is_file():
                raise ConfigError(f"{where} = {value!r}: here that is {choice(f'{key}@{where}', value)}")
            wanted = re.sub(r"(typing|collections\.abc|torch)\.([a-z.]+\.)?", "", inspect.formatannotation(hint))
            raise ConfigError(f"{where} = {value!r}: {name} takes {wanted} here, not {type(value).__name__}")
        if is_dataclass(hint) and "_target_" not in value:
            check_arguments(value, hint, where, where)


def choice(slot: str, option: str) -> str:
    """The override that takes an option of a group, and the one that has to go with it."""
    text = f"{slot}={option}"
    return f"{text} {PARTNERS[text]}" if text in PARTNERS else text


def words_of(hint: Any) -> list[str]:
    """What the items of a list may be, where its annotation has words for them; else []."""
    for option in (hint, *typing.get_args(hint)):
        if typing.get_origin(option) in (list, Sequence):
            item = next(iter(typing.get_args(option)), None)
            return list(typing.get_args(item)) if typing.get_origin(item) is Literal else []
    return []


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


def check_model_config(node: Any, path: str = "model", trust: str | Sequence[str] | None = ()) -> None:
    """Refuse a stored model config whose `_target_`s reach beyond model code, before anything of it is imported.

    Allowed are callables of the detector's model packages, and nn.Module classes of torch, torchvision, timm and of the
    modules in `trust`.
    """
    ours = tuple(f"detector.{part}." for part in MODEL_CODE)
    check_stored(node, path, "a part of a model", ours, ("torch.nn.", "torchvision.", "timm."), nn.Module, trust)


def check_transforms_config(node: Any, path: str = "augment.val", trust: str | Sequence[str] | None = ()) -> None:
    """Refuse stored transforms that are anything else than transform classes of the detector, of albumentations, or of
    the modules in `trust`."""
    import albumentations

    kinds = (albumentations.BasicTransform, albumentations.BaseCompose)
    check_stored(node, path, "a transform", (), ("detector.data.", "albumentations."), kinds, trust)


def check_stored(
    node: Any,
    path: str,
    what: str,
    ours: tuple[str, ...],
    others: tuple[str, ...],
    kinds: type | tuple[type, ...],
    trust: str | Sequence[str] | None = (),
) -> None:
    """Refuse every `_target_` that is neither a callable defined in the detector under a name that starts with one of
    `ours`, nor a class of `kinds` under one of `others`, nor a class of `kinds` that is defined in a module named in
    `trust` or below it; and interpolations, which could make targets later."""
    trusted = tuple(f"{name}." for name in ([trust] if isinstance(trust, str) else trust or ()))
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict) and "_target_" in node:
        name = str(node["_target_"])
        target = find_target(name, path) if name.startswith(ours + others + trusted) else None
        home = f"{getattr(target, '__module__', '')}."
        is_kind = inspect.isclass(target) and issubclass(target, kinds)
        is_ours = name.startswith(ours) and home.startswith("detector.")
        if not (is_ours or (is_kind and (name.startswith(others) or home.startswith(trusted)))):
            hint = "" if name.startswith(trusted) else how_to_trust(name)
            raise ConfigError(f"{path}._target_ = {name!r}: not {what}; this config is not trusted{hint}")
    if isinstance(node, str) and "${" in node:
        raise ConfigError(f"{path} = {node!r}: a stored config holds values only; this one is not trusted")
    for key, value in children:
        check_stored(value, f"{path}.{key}", what, ours, others, kinds, trust)


def needed_trust(config: Mapping[str, Any]) -> list[str]:
    """The modules that `trust` must name for a checkpoint of a run with this config."""
    stored = flatten({"model": config["model"], "val": config["augment"]["val"]})
    modules = {str(value).partition(".")[0] for key, value in stored.items() if key.endswith("._target_")}
    return sorted(modules - NOT_THE_USERS)


def how_to_trust(name: str) -> str:
    """What to add where `name` may be the user's own class; "" for what is surely none."""
    module = name.partition(".")[0]
    if not module.isidentifier() or module in NOT_THE_USERS:
        return ""
    return (
        f". If {module} is yours or of someone whom you trust, say so: trust={module} on the command line (--trust "
        f'{module} for `detector export`), trust="{module}" in detector.load'
    )


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
