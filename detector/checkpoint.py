"""Files of trained detectors: written so that a crash at any moment loses nothing, read without running code from them.

A checkpoint is a dict of tensors and plain values:
    format, versions, config, categories, category_ids, keypoint_names, iteration, evaluated, nonfinite, metrics,
    meters, best {metric, value, iteration}, model, ema, optimizer, scheduler, scaler, sampler {position},
    rng [one per rank], contents {train, val: {annotations, sizes}} of the data,
    operating_point {see evaluation/operating_point.py}
A safetensors file holds its weights, and in the header what is needed to build the model again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from detector.ops.checks import ConfigError, RunError

FORMAT = "detector checkpoint 1"
SAFETENSORS = "detector safetensors 1"
FIELDS = (
    "config",
    "categories",
    "category_ids",
    "keypoint_names",
    "operating_point",
)  # of a checkpoint, in a safetensors file
MOVED = {  # where modules, and what left them, are now: `_target_`s of older checkpoints and configs; the longest fits
    "detector.augmented.": "detector.inference.tta.",
    "detector.backbone.deform.": "detector.backbone.resnet.",
    "detector.backbone.fpn.": "detector.backbone.necks.",
    "detector.backbone.pafpn.": "detector.backbone.necks.",
    "detector.backbone.single.": "detector.backbone.necks.",
    "detector.boxes.": "detector.ops.boxes.",
    "detector.checks.": "detector.ops.checks.",
    "detector.config.Data": "detector.settings.Data",
    "detector.config.Split": "detector.settings.Split",
    "detector.data.annotations.Problems": "detector.data.read_coco.Problems",
    "detector.data.annotations.read_coco": "detector.data.read_coco.read_coco",
    "detector.data.coco.": "detector.data.dataset.",
    "detector.data.masks.": "detector.data.outlines.",
    "detector.engine.checkpoint.": "detector.engine.run_folder.",
    "detector.engine.distributed.": "detector.runtime.",
    "detector.engine.logging.": "detector.engine.journal.",
    "detector.engine.schedule.": "detector.engine.optimizer.",
    "detector.engine.settings.": "detector.settings.",
    "detector.evaluation.alignment.": "detector.comparison.alignment.",
    "detector.evaluation.charts.": "detector.comparison.charts.",
    "detector.evaluation.comparison.": "detector.comparison.summary.",
    "detector.evaluation.cost.": "detector.comparison.cost.",
    "detector.evaluation.explorer.": "detector.explorer.",
    "detector.evaluation.masks.": "detector.ops.paste.",
    "detector.evaluation.report.": "detector.comparison.report.",
    "detector.evaluation.run.": "detector.commands.evaluate.",
    "detector.evaluation.runs.": "detector.comparison.runs.",
    "detector.evaluation.statistics.": "detector.comparison.statistics.",
    "detector.evaluation.study.": "detector.commands.compare.",
    "detector.heads.stage.": "detector.heads.trunk.",
    "detector.layers.": "detector.ops.layers.",
    "detector.losses.": "detector.ops.losses.",
    "detector.matching.": "detector.ops.sampling.",
    "detector.multirun.": "detector.config.multirun.",
    "detector.predict.": "detector.inference.predict.",
    "detector.roi.dispatch.": "detector.roi.base.",
    "detector.roi.levels.": "detector.roi.extractor.",
    "detector.rpn.anchors.": "detector.rpn.",
    "detector.rpn.rpn.": "detector.rpn.",
    "detector.sampling.": "detector.ops.sampling.",
    "detector.validate.": "detector.commands.validate.",
    "detector.visualize.": "detector.inference.draw.",
    "detector.weights.architecture.Undrawn": "detector.weights.architecture.SkipInit",
    "detector.weights.convert.": "detector.commands.import_weights.",
    "detector.weights.export.": "detector.export.export.",
    "detector.weights.onnx_ops.": "detector.export.onnx_ops.",
    "detector.weights.portable.": "detector.checkpoint.",
    "detector.winograd.": "detector.ops.winograd.",
}


class CheckpointError(ConfigError):
    """The file is not a checkpoint that can be used: the message names it and says what to do."""


def save(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint atomically: whoever reads `path` finds the old file or the new one, never a part of it.

    Raises RunError, the previous file untouched, if the disk is full or not writable.
    """
    versions = {
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
    }
    atomically(path, lambda file: torch.save({"format": FORMAT, "versions": versions, **state}, file))


def atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, then put it in its place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with news_of_children_waits():
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name itself must survive a power cut
            finally:
                os.close(folder)
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and not isinstance(error.__context__, OSError):
            raise  # torch's zip writer makes a RuntimeError of a full disk; others have nothing to do with the file
        free = shutil.disk_usage(path.parent).free / 2**20
        raise RunError(
            f"{path} could not be written ({error}); {free:.0f} MiB are free there. The previous checkpoint is intact: "
            "make room and start the same command again, it continues from there"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def news_of_children_waits() -> Iterator[None]:
    """Let SIGCHLD wait. When a data-loading process has died, torch raises from it wherever the main thread is, and its
    zip writer, torn off in the middle, blames the file or aborts the process.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGCHLD, lambda *news: arrived.append(news))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
    if arrived:
        handler(*arrived[-1])


def load(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    Raises CheckpointError for a file that is missing, truncated, or not a checkpoint of this project.
    """
    path = Path(path)
    if path.is_dir():
        held = [name for name in ("best.pt", "last.pt") if (path / name).is_file()]
        runs = sorted(path.glob("*/best.pt")) or sorted(path.glob("*/last.pt"))
        files = [path / name for name in held] or runs[:3]
        there = f"; take {' or '.join(map(str, files))}" if files else ", without a best.pt or last.pt"
        raise CheckpointError(f"{path}: is a folder{there}")
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.pt"))) or "none"
        raise CheckpointError(f"{path}: there is no such checkpoint (in its folder: {others})")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not readable as a checkpoint: truncated, damaged or of another program ({reason}). "
            "Use another file of the run, or resume=none to start anew"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        keys = ", ".join(map(str, list(state)[:5])) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path}: a torch file but no checkpoint of this project (it holds: {keys}). "
            "detector.weights.load_foreign reads the weights of other libraries"
        )
    return state | {"config": with_new_names(state["config"])} if "config" in state else state


def new_name(target: str) -> str:
    """The dotted path at which what `target` names is now."""
    old = max((old for old in MOVED if target.startswith(old)), key=len, default="")
    return MOVED.get(old, "") + target.removeprefix(old)


def with_new_names(config: Any) -> Any:
    """A copy of nested dicts and lists in which every `_target_` is where the code is now."""
    if isinstance(config, Mapping):
        return {
            k: new_name(v) if k == "_target_" and isinstance(v, str) else with_new_names(v) for k, v in config.items()
        }
    return [with_new_names(item) for item in config] if isinstance(config, list) else config


def flatten(config: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts and lists as {dotted key: leaf}."""
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else None
    if items is None:
        return {path: config}
    flat = {}
    for key, value in items:
        flat |= flatten(value, f"{path}.{key}" if path else str(key))
    return flat


def write_json(path: str | Path, content, indent: int | None = None) -> None:
    """Write `content` so that a reader, or a crash, never meets half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_safetensors(state: Mapping[str, Any], path: str | Path) -> None:
    """Write the weights of a checkpoint (the averaged ones if there are some) with its config and categories.

    state: what `load` returns. The optimizer and all else that only training needs stays behind.
    """
    header = {"format": SAFETENSORS} | {field: json.dumps(state[field]) for field in FIELDS if field in state}
    tensors = {name: tensor.contiguous().clone() for name, tensor in (state["ema"] or state["model"]).items()}
    content = to_bytes(tensors, header)
    atomically(Path(path), lambda file: file.write(content))


def load_safetensors(path: str | Path) -> dict[str, Any]:
    """What detector.load needs of a file that `save_safetensors` wrote: {"model", "ema", "config", "categories", ...}.

    Raises ConfigError for a file that is missing, damaged, or holds other tensors.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != SAFETENSORS:
                raise ConfigError(
                    f"{path}: safetensors without the config of a detector of this project; give the weights of other "
                    "programs as model.weights or model.backbone.weights"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not readable as safetensors: cut short or of another format ({error})") from error
    about = {field: json.loads(header[field]) for field in FIELDS if field in header}
    return {"model": tensors, "ema": None, **about, "config": with_new_names(about["config"])}
