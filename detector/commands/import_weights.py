"""From somebody's file to a checkpoint of ours that `detector.load`, eval.py and predict.py take as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from detector import checkpoint
from detector.config import compose
from detector.weights.architecture import build_model, model_config
from detector.weights.categories import published
from detector.weights.loading import read_foreign
from detector.weights.presets import RESIZING, in_squares


def convert(
    source: str | Path,
    out: str | Path,
    framework: str | None = None,
    style: str | None = None,
    categories: list[str] | None = None,
) -> dict[str, Any]:
    """Write the checkpoint of a foreign detector as ours, and return it.

    One of ours, safetensors too, keeps its config; what only training needs stays behind.

    Args:
        source, framework, style: see `load_foreign`.
        out: the file to write.
        categories: names of the classes in the order of the weights; None for what the file says, or else for those of
            COCO (80 classes, torchvision's 90, or 1: person) and Pascal VOC (20).

    Raises FileNotFoundError, and ValueError where keys do not fit or the categories are another number.
    """
    weights, framework, told, contents = read_foreign(source, framework, style, categories)
    if framework == "detector" and "config" in contents:
        if style is not None:
            raise ValueError(f"style={style!r}: the config in {source} says it")
        return copy_ours(contents, told, Path(out))
    config = model_config(*weights)
    names, ids = category_names(config["num_classes"], told)
    model = build_model(weights)
    data = "coco_keypoints" if "keypoint_head" in config else "coco"
    usual = compose("train", ["experiment=none", "augment=default", f"data={data}"])  # images of 800 to 1333 px, as all
    usual = {key: OmegaConf.to_container(usual[key], resolve=True) for key in ("augment", "data")}
    for split in ("train", "val"):
        usual["augment"][split][0] |= RESIZING[framework]
    if in_squares(framework, weights.state_dict):  # images have 1024 px at most
        usual["augment"]["val"][0] |= {"size": 1024, "max_size": 1024}
        usual["data"]["pad_multiple"] = 1024
    config = {"model": config, **usual, "seed": 0}
    state = {"model": model.state_dict(), "ema": None, "config": config, "categories": names, "category_ids": ids}
    checkpoint.save(state | {"iteration": 0, "metrics": {}, "best": {}}, Path(out))
    return state


def copy_ours(contents: Mapping[str, Any], categories: list[str] | None, out: Path) -> dict[str, Any]:
    """Write what a checkpoint of ours holds but for the state of its training."""
    state = {"iteration": 0, "metrics": {}, "best": {}}
    state |= {key: contents[key] for key in (*checkpoint.FIELDS, *state) if key in contents}
    state |= {"model": contents.get("ema") or contents["model"], "ema": None}
    state |= {"config": checkpoint.with_new_names(contents["config"])}
    if categories is not None:  # else it is an RPN's
        state["categories"] = categories
    checkpoint.save(state, out)
    return state


def category_names(num_classes: int, told: list[str] | None) -> tuple[list[str], list[int]]:
    """Names and COCO ids of the classes 1..num_classes."""
    known = published(num_classes)
    if told is not None and (known is None or told != known[0]):
        return told, list(range(1, num_classes + 1))
    if known is None:
        raise ValueError(f"these weights have {num_classes} classes, of unknown names: give them with --categories")
    return known
