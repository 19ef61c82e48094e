"""Messages for what Hydra cannot compose: which override it stumbled over, and what may have been meant."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from detector.config.schema import CONFIGS, build, choice, find_target, near
from detector.ops.checks import ConfigError

# What other frameworks call things, and the override that does it here; a key of which only the last part is given is
# found without this table.
ELSEWHERE = {
    "optimizer.lr=...": ("learning_rate", "lr0", "base_lr"),
    "schedule.max_epochs=...": ("epochs", "num_epochs", "n_epochs", "epoch"),
    "schedule.max_iterations=...": ("iterations", "iters", "max_iter", "max_iters", "steps", "max_steps"),
    "schedule.warmup=...": ("warmup_iters", "warmup_steps", "warmup_epochs"),
    "training.batch_size=...": ("batch", "bs", "batchsize", "ims_per_batch", "samples_per_gpu"),
    "training.accumulate=...": ("accumulate_grad_batches", "gradient_accumulation_steps"),
    "training.clip_norm=...": ("grad_clip", "max_norm", "clip_grad"),
    "augment=default augment.short_edge=... augment.max_size=...": (
        "imgsz",
        "img_size",
        "image_size",
        "imsize",
        "input_size",
        "size",
    ),
    "backbone@model.backbone=resnet18": ("backbone", "model.backbone", "encoder", "arch"),
    "neck@model.neck=pafpn": ("neck", "model.neck"),
    "class_loss@model.box_head.class_loss=focal": ("class_loss", "model.box_head.class_loss", "loss", "loss_cls"),
    "model.weights=...": ("weights", "pretrained", "pretrained_weights", "load_from", "checkpoint", "ckpt", "init"),
    "resume=...": ("resume_from", "auto_resume"),
    "data.root=...": ("dataset", "data_dir", "data_root", "path", "dir"),
    "run_dir=...": ("output", "output_dir", "out", "out_dir", "work_dir", "project", "save_dir", "log_dir"),
    "runtime.precision=bf16": ("amp", "fp16", "bf16", "half", "mixed_precision"),
    "runtime.workers=...": ("num_workers", "n_workers", "workers_per_gpu"),
    "runtime.device=...": ("gpu", "cuda", "accelerator"),
    "model.box_head.score_threshold=...": ("conf", "confidence", "score_thr", "score_thresh"),
    "threshold=...": ("conf", "confidence", "score_thr", "score_thresh", "score_threshold"),
    "model.box_head.nms_threshold=...": ("iou", "iou_threshold", "nms", "nms_thr", "nms_thresh"),
    "model.box_head.detections_per_image=...": ("max_det", "max_per_img", "detections", "max_detections"),
    "images=...": ("source", "input", "inputs", "img", "image", "files", "path", "dir"),
    "checkpoint=...": ("weights", "model.weights", "ckpt", "load_from"),
    "data.val.annotations=... data.val.images=...": ("annotations", "ann_file", "dataset", "data"),
    "logger=[tensorboard,wandb]": ("wandb", "use_wandb"),
    "logger=[tensorboard,mlflow]": ("mlflow", "use_mlflow"),
    "torchrun --nproc-per-node=... before the command": ("gpus", "num_gpus", "devices", "nproc", "world_size"),
}
EITHER = ("schedule.max_epochs", "schedule.max_iterations")  # exactly one has a value
OPTIONS = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # those of Hydra's that say where configs are
OPTIONS.add_argument("--config-dir", "-cd")
OPTIONS.add_argument("--config-name", "-cn")


def hydra_options(arguments: Sequence[str]) -> tuple[str | None, list[Path]]:
    """The --config-name of a command line, and the folders whose configs it adds to ours (--config-dir DIR,
    hydra.searchpath=[file://DIR]).

    Raises ConfigError for a file there that Hydra would pass over, because ours has its name.
    """
    options = OPTIONS.parse_known_args(arguments)[0]
    folders = [options.config_dir] if options.config_dir else []
    for text in arguments:
        if text.lstrip("+").startswith("hydra.searchpath="):
            folders += re.findall(r"file://([^,'\"\]]+)", text)
    folders = [Path(folder).absolute() for folder in folders if Path(folder).is_dir()]  # Hydra names the others
    for folder in folders:
        for ours in sorted(CONFIGS.glob("**/*.yaml")):
            file = folder / ours.relative_to(CONFIGS)
            if file.is_file() and file.read_bytes() != ours.read_bytes():
                raise ConfigError(
                    f"{file}: the detector has a config of this name and would take its own; rename yours"
                )
    return options.config_name, folders


def options_of_groups(folders: Sequence[Path]) -> dict[str, list[str]]:
    """The options of each config group in configs/ and in further folders."""
    groups: dict[str, list[str]] = {}
    for folder in (CONFIGS, *folders):
        for file in sorted(folder.glob("*/**/*.yaml")):
            groups.setdefault(file.parent.relative_to(folder).as_posix(), []).append(file.stem)
    return groups


def list_options(config_name: str, arguments: Sequence[str]) -> str:
    """For --help: the groups that a program's config chooses from, with their options; "" if there are none."""
    name, folders = hydra_options(arguments)
    slots, options = slots_of(compose(name or config_name, folders=folders)), options_of_groups(folders)
    groups = {slot: options[slot.partition("@")[0]] for slot in slots if not slot.startswith(("hydra/", "heads/fit"))}
    slots = [slot for slot in groups if not slot.startswith("roi@") and len(groups[slot]) > 1]
    width, lines = max(80, min(120, shutil.get_terminal_size((120, 24)).columns)), [""]
    for slot in sorted(slots):
        names = f"    {slot + '=':24}{', '.join(groups[slot])}"
        lines += textwrap.wrap(names, width, subsequent_indent=" " * 28, break_on_hyphens=False)
    return "\n".join(["", "Groups and their options:", *lines[1:]]) if slots else ""


def explain(error: Exception, config_name: str, overrides: Sequence[str]) -> str:
    """Which override Hydra stumbled over and what it may have meant; else Hydra's own words on one line."""
    try:
        found = culprit(config_name, overrides)
    except Exception:
        found = None  # the files themselves do not compose
    return " ".join((found or str(error)).split())


def culprit(config_name: str, overrides: Sequence[str]) -> str | None:
    """The first override that names what does not exist."""
    name, folders = hydra_options(overrides)
    config_name, groups = name or config_name, options_of_groups(folders)
    chosen, values = [], []
    for text in overrides:
        if text.startswith("-") or not ("=" in text or text.startswith("~")):
            continue  # Hydra's own options
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as problem:
            key, _, value = text.partition("=")
            bare = "=" in value and value[0] not in "[{'\""  # such as the name of a method that has settings in it
            mend = f"""; as a text it wants quotes: '{key}="{value}"'""" if bare else ""
            return f"{text}: {' '.join(str(problem).split())}{mend}"
        if not override.key_or_group.startswith("hydra/"):  # has options of plugins beside ours
            (chosen if override.key_or_group in groups else values).append((text, override))
    for text, override in chosen:
        options = groups[override.key_or_group]
        for option in re.split(r"[,\[\]]", text.partition("=")[2].strip("'\"")):
            if option and option not in ("null", "choice") and option.strip() not in options:
                others = f"{near(option, options)} There are: {', '.join(options)} (--config-dir DIR adds your own)"
                return f"{override.key_or_group}={option}: configs/{override.key_or_group} has no {option!r}{others}"
    known = compose(config_name, folders=folders)
    slots = [slot for slot in slots_of(known) if not slot.startswith("hydra/")]
    for text, override in chosen:
        slot = text.lstrip("+~").partition("=")[0]
        keys = [
            key
            for key in leaves(known)
            if key.startswith(f"{slot}.") and not OmegaConf.is_dict(OmegaConf.select(known, key))
        ]
        if slot not in slots and keys and not override.is_add():
            return f"{text}: {slot} is no choice of a file here; its keys are {', '.join(keys)}"
        if slot not in slots and ("@" in slot or not override.is_add()):
            meant = elsewhere(slot, slots, text.partition("=")[2], known)
            meant = f"{meant}." if meant else near(slot, slots)
            return f"{text}: no {slot!r} in this configuration{meant} There are: {', '.join(slots)}"
    single = [text for text, override in chosen if not override.is_sweep_override()]
    known = compose(config_name, single, folders)
    names = leaves(known) + slots
    for text, override in values:
        key = override.key_or_group
        if override.is_add() or key.startswith("hydra"):
            continue
        if key not in names:
            of_logger = re.match(rf"logger\.({'|'.join(groups['logger'])})\.", key)
            if of_logger and f"logger.{of_logger[1]}" not in names:
                return f"{text}: {of_logger[1]} is not among the loggers; add logger=[tensorboard,{of_logger[1]}]"
            if key.rpartition(".")[2] in arguments_of(known, key.rpartition(".")[0]):
                refused = refusal(compose(config_name, [*single, f"+{text}"], folders), key.rpartition(".")[0])
                return f"{text}: {refused or f'{key} has no value yet; add one with +{text}'}"
            return (
                f"{text}: there is no {key!r}{elsewhere(key, names, text.partition('=')[2], known) or near(key, names)}"
            )
    return None


def refusal(cfg: DictConfig, path: str) -> str:
    """What the settings at `path` say against their values, where they are settings alone; else ''."""
    node = OmegaConf.select(cfg, path)
    if not is_dataclass(find_target(node._target_, path)):
        return ""  # parts of a model: made when the run is
    try:
        build(node, path)
    except ConfigError as error:
        return str(error)
    return ""


def slots_of(cfg: DictConfig) -> list[str]:
    """The places of a composed config that an option of a group fills. Those that take several Hydra does not list."""
    return [slot.removeprefix("/") for slot in cfg.hydra.runtime.choices] + ["logger"] * ("logger" in cfg)


def elsewhere(key: str, names: Sequence[str], value: str = "...", known: DictConfig | None = None) -> str:
    """'; here that is optimizer.lr=...' for the last part of a key, or a word of another framework; else ''.

    value: what was typed behind the '='; known: the config, where values are left out that would contradict it.
    """
    ours = [f"{name}=..." for name in names if name.endswith(f".{key}") and "@" not in name]
    theirs = [override for override, words in ELSEWHERE.items() if key.lower() in words]
    theirs = [override for override in theirs if override.split("=")[0] in names or override.startswith("torchrun")]
    shown = dict.fromkeys(with_value(override, value, known) for override in sorted(ours, key=len)[:3] + theirs)
    return f"; here that is {' or '.join(shown)}" if shown else ""


def with_value(override: str, value: str, known: DictConfig | None) -> str:
    """An override with the value that was typed, where it can be one of that key, and what has to go with it."""
    key, _, example = override.partition("=")
    if "@" in key:  # a choice, which has an example
        return choice(key, value if value in options_of_groups(()).get(key.partition("@")[0], ()) else example)
    if value.lower() in ("", "true", "false", "null", "none"):
        value = "..."  # a switch elsewhere, no switch here
    elif key == "runtime.device" and value.isdigit():
        value = f"cuda:{value}"
    other = EITHER[1 - EITHER.index(key)] if key in EITHER else None
    rest = f" {other}=null" if other and known and OmegaConf.select(known, other) is not None else ""
    return override.replace("...", value) + rest


def arguments_of(cfg: DictConfig, path: str) -> list[str]:
    """What the callable of the node at `path` takes."""
    target = OmegaConf.select(cfg, f"{path}._target_") if path else None
    return list(inspect.signature(find_target(target, path)).parameters) if target else []


def compose(config_name: str, overrides: Sequence[str] = (), folders: Sequence[Path] = ()) -> DictConfig:
    """The composed config without running it, Hydra's own node included; `folders` have further configs."""
    if folders:
        overrides = [text for text in overrides if not text.lstrip("+").startswith("hydra.searchpath=")]
        overrides.append("hydra.searchpath=[" + ",".join(f"'file://{folder}'" for folder in folders) + "]")
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra.compose(config_name, list(overrides), return_hydra_config=True)


def arguments(config_name: str, overrides: Sequence[str] = (), folders: Sequence[Path] = ()) -> dict[str, Any]:
    """What the program of a config gives to its command, as its keyword arguments: `train(**arguments("train", [...]))`
    is `detector train ...` in Python."""
    from detector.config.program import share_roi

    cfg = compose(config_name, overrides, folders)
    share_roi(cfg, cfg.hydra)
    return OmegaConf.to_container(OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"]), resolve=True)


def leaves(node: Any, path: str = "") -> list[str]:
    """All dotted keys of a config, Hydra's own left out."""
    keys = []
    for key in node if isinstance(node, DictConfig) else ():
        if path or key != "hydra":
            name = f"{path}.{key}" if path else str(key)
            child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
            keys += [name, *leaves(child, name)]
    return keys
