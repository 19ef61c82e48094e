"""A trained detector from its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate

from detector.checkpoint import load as load_checkpoint
from detector.checkpoint import load_safetensors
from detector.config import ConfigError, build, config_errors
from detector.config.schema import check_model_config, check_transforms_config
from detector.data import Pictures, Pipeline
from detector.evaluation.operating_point import OPERATING_POINT
from detector.evaluation.proposals import OBJECT
from detector.inference.predict import Detector
from detector.ops.layers import to_preferred_layout
from detector.weights.downloads import HUB, located


def load(
    checkpoint: str | Path | Mapping,
    device: str | torch.device = "cpu",
    changes: Mapping | None = None,
    trust: str | Sequence[str] | None = (),
) -> Detector:
    """The detector of a checkpoint (path, or what checkpoint.load returned) in evaluation mode.

    The averaged weights are taken if the run kept any. changes: nested dict of settings of the model that differ from
    the checkpoint's, such as {"box_head": {"score_threshold": 0.01}}. trust: names of modules, beyond the detector's,
    whose classes the checkpoint may name as parts of the model: they are imported. What a checkpoint itself says of
    trust is never asked.

    Raises ConfigError (a ValueError) naming the file if it is missing, damaged, or its weights do not fit its config.
    """
    name = checkpoint if isinstance(checkpoint, (str, Path)) else "checkpoint"
    state = checkpoint if isinstance(checkpoint, Mapping) else read(checkpoint)
    config, categories = state["config"], list(state["categories"])
    node = merge(config["model"], changes or {})
    check_model_config(node, trust=trust)
    pad_multiple = (config.get("data") or {}).get("pad_multiple", 32)
    model = build(node, "model", num_classes=len(categories), pad_multiple=pad_multiple)
    try:
        model.load_state_dict(state["ema"] or state["model"])
    except RuntimeError as error:
        raise ConfigError(f"{name}: the weights do not fit the model of the same file: {error}") from None
    model.to(device).eval().requires_grad_(False)
    if model.layout == torch.channels_last:
        to_preferred_layout(model, torch.device(device))
    ids = list(state["category_ids"])
    if model.box_head is None:  # proposals, of whatever class
        categories, ids = ["object"], [OBJECT]
    transforms = validation_transforms(config, trust)
    known = {name: state.get(name) for name in ("keypoint_names", "contents", "iteration")}
    known["operating_point"] = evaluated_point(checkpoint, state) or state.get("operating_point") or None
    return Detector(model, categories, ids, config, transforms, **known)


def evaluated_point(checkpoint: str | Path | Mapping, state: Mapping) -> dict | None:
    """The operating point that `detector eval` has left beside a checkpoint, of these very weights; None without."""
    if isinstance(checkpoint, Mapping):
        return None
    file = Path(checkpoint).parent / f"eval_{Path(checkpoint).stem}" / OPERATING_POINT
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("iteration") == state.get("iteration", -1) else None


def read(path: str | Path) -> dict:
    """A checkpoint, or a safetensors file that `detector export` wrote, also that of hf://owner/repo[/file][@revision].

    Raises ConfigError, and for what the hub does not have or has as a pickle alone.
    """
    if str(path).startswith("hf://"):
        with config_errors("checkpoint"):
            name = (HUB.fullmatch(str(path)) or [None] * 3)[2]
            if name is not None and not name.endswith(".safetensors"):
                raise ValueError(
                    f"{path}: from the hub only .safetensors are loaded; `detector weights get {path}` prints where a "
                    "file is that you trust"
                )
            path = located(str(path))
    return load_safetensors(path) if Path(path).suffix == ".safetensors" else load_checkpoint(path)


def validation_transforms(config: Mapping, trust: str | Sequence[str] | None = ()) -> Pipeline:
    """The pipeline that a run's config prescribes for evaluation, checked to do no more than resize.

    trust: see `load`.
    """
    steps = (config.get("augment") or {}).get("val") or []
    check_transforms_config(steps, trust=trust)
    with config_errors("augment.val"):
        channels = Pictures.of(config.get("data")).channels
        pipeline = Pipeline([instantiate(step, _convert_="all") for step in steps], channels=channels)
    probe = np.array([[0, 0, 96, 64], [12, 8, 72, 40]], np.float32)
    result = pipeline(np.zeros((64, 96, channels), np.uint8), probe)
    height, width = result.image.shape[:2]
    expected = probe * np.tile(np.array([width / 96, height / 64], np.float32), 2)
    if result.boxes.shape != probe.shape or np.abs(result.boxes - expected).max() > 1e-2 * max(height, width) / 64:
        raise ConfigError("augment.val: must only resize the image: detections could not be put back into the original")
    return pipeline


def merge(base: Mapping, changes: Mapping) -> dict:
    """Nested dicts: `base` with the values of `changes` that are not None."""
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), Mapping):
            merged[key] = merge(base[key], value)
        elif value is not None and not (isinstance(value, Mapping) and not any(v is not None for v in value.values())):
            merged[key] = value
    return merged
