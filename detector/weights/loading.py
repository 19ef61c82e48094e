"""From somebody's checkpoint to a state dict under our names, with what it says of its settings and classes."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_weight

from detector.weights.categories import categories_of
from detector.weights.downloads import is_address, located
from detector.weights.keymaps import (
    CAFFE2_TO_DETECTRON2,
    DETECTRON2,
    MMDET,
    MMDET_REGNET,
    TORCHVISION,
    UNUSED,
    compile_table,
    detectron2_resnet,
    rename,
    resnet,
)
from detector.weights.presets import RGB, presets_of
from detector.weights.reading import read_file, state_dict_of
from detector.weights.zoo import find

log = logging.getLogger(__name__)
SOURCES = ("torchvision", "detectron2", "mmdet", "detector")  # the last are our own checkpoints
TABLES = {
    "torchvision": compile_table(TORCHVISION | resnet("", "backbone.")),  # the latter are classifiers
    "detectron2": compile_table(DETECTRON2 | detectron2_resnet("", "backbone.")),
    "mmdet": compile_table(MMDET | resnet("", "backbone.")),
}
REGNET = compile_table(MMDET_REGNET)
CAFFE2 = compile_table(CAFFE2_TO_DETECTRON2)
RATIOS = 3  # of the anchors; all published models have 0.5, 1 and 2
WITHOUT_EPS = r"_fpn_coco-[0-9a-f]{8}|RCNN_ResNet50_FPN_Weights\.COCO"  # torchvision's first published detectors


class ForeignWeights(NamedTuple):
    """What `load_foreign` returns."""

    state_dict: dict[str, Tensor]  # under our names, in our order of classes and anchors
    presets: dict[str, Any]  # {key of the model config: value} that the weights were trained with


def load_foreign(
    path_or_state_dict: str | Path | Mapping[str, Any], source: str | None = None, style: str | None = None
) -> ForeignWeights:
    """Weights of torchvision, detectron2 or mmdetection as a state dict of our model, with the settings they need.

    Args:
        path_or_state_dict: a file (.pth, .pt, detectron2's and Caffe2's .pkl, .safetensors), what was in it, or what
            `downloads.located` finds: 'detectron2:mask_rcnn_R_50_FPN_3x', 'hf://owner/repo', 'https://...'; and a name
            of torchvision's such as 'MaskRCNN_ResNet50_FPN_Weights.COCO_V1'. Nothing in a file is executed.
        source: 'torchvision', 'detectron2', 'mmdet', or 'detector' (our own checkpoints); None looks at the keys.
        style: 'caffe' or 'pytorch': where bottlenecks stride and how images are normalised. None takes what the file
            says, else what that framework's published models of that kind have.

    Returns the state dict and the presets, `{"rpn.anchor_rounding": True, ...}`. Keys that a model has no use for are
    logged. Classifiers give `backbone.` keys alone.

    Raises FileNotFoundError, and ValueError for an unknown source or for keys that no rule knows, all of them listed.
    """
    return read_foreign(path_or_state_dict, source, style).weights


class Foreign(NamedTuple):
    """What `read_foreign` returns."""

    weights: ForeignWeights
    source: str  # whose they are: one of SOURCES
    categories: list[str] | None  # of the predictors' rows, see `categories_of`
    contents: Mapping[str, Any]  # of the file


def read_foreign(
    path_or_state_dict: str | Path | Mapping[str, Any],
    source: str | None = None,
    style: str | None = None,
    categories: list[str] | None = None,
) -> Foreign:
    """What `load_foreign` returns, and what else the file tells. categories: names of its classes, whatever it says."""
    if source not in (None, *SOURCES):
        raise ValueError(f"source={source!r}: expected one of {', '.join(SOURCES)}, or None to recognise it")
    if style not in (None, "caffe", "pytorch"):
        raise ValueError(f"style={style!r}: expected 'caffe', 'pytorch' or None")
    is_path = isinstance(path_or_state_dict, str | Path)
    if is_path and (row := find(str(path_or_state_dict))):
        if source not in (None, row.framework):
            raise ValueError(f"source={source!r}: {path_or_state_dict} is {row.framework}'s")
        source = row.framework
    if is_path and is_address(str(path_or_state_dict)):
        path_or_state_dict = located(str(path_or_state_dict))
    if is_path and re.fullmatch(r"\w+_Weights\.\w+", str(path_or_state_dict)):
        contents = get_weight(str(path_or_state_dict)).get_state_dict()
    else:
        contents = read_file(path_or_state_dict) if is_path else path_or_state_dict
    theirs = state_dict_of(contents)
    source = source or recognise(theirs)
    style = style or style_in(contents, Path(path_or_state_dict).name if is_path else "")
    if source == "detector":
        return Foreign(ForeignWeights(theirs, {}), source, categories_of(contents, theirs, categories), contents)
    state, unused = translate(theirs, source)
    if unused:
        log.info("not used by the model: %s", ", ".join(unused))
    if is_path and source == "torchvision" and re.search(WITHOUT_EPS, str(path_or_state_dict)):
        without_eps(state)
    presets = presets_of(source, state, style) | pixels_in(contents, theirs)
    return Foreign(ForeignWeights(state, presets), source, categories_of(contents, state, categories), contents)


def recognise(state: Mapping[str, Tensor]) -> str:
    """The framework that names parameters like this. Raises ValueError if none does."""
    marks = {
        "detector": ("rpn.head.objectness_logits.", "rpn.head.deltas."),
        "detectron2": ("proposal_generator.", "backbone.bottom_up.", "backbone.net.", "backbone.res", "stem.", "res2"),
        "mmdet": ("rpn_head.", "bbox_head.", "roi_head.", "neck."),
        "torchvision": ("backbone.body.", "rpn.head.cls_logits", "layer1."),
    }
    for source, prefixes in marks.items():
        if any(key.startswith(prefixes) for key in state):
            return source
    first = ", ".join(list(state)[:3])
    raise ValueError(f"the weights ({first}, ...) are of none of {', '.join(SOURCES)}: give the source if they are")


def style_in(contents: Mapping[str, Any], name: str) -> str | None:
    """'caffe' or 'pytorch' if a checkpoint says it: in the config text it carries or in its file's name."""
    found = re.search(r"""style=['"](caffe|pytorch)['"]""", config_text(contents))
    if found:
        return found[1]
    if contents.get("__author__") == "torchvision":  # detectron2's conversion of torchvision's classifier
        return "pytorch"
    return "caffe" if re.search(r"caffe|msra", name, re.IGNORECASE) else None


def config_text(contents: Mapping[str, Any]) -> str:
    """The config that mmdetection wrote into its checkpoint; empty if there is none."""
    meta = contents.get("meta") if isinstance(contents.get("meta"), dict) else {}
    return next((meta[key] for key in ("config", "cfg") if isinstance(meta.get(key), str)), "")


def pixels_in(contents: Mapping[str, Any], theirs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Pixel statistics and channel order, if the checkpoint has them: in detectron2's buffers, in mmdetection's."""
    if contents.get("__author__") == "torchvision":
        return RGB
    if "pixel_mean" in theirs and "pixel_std" in theirs:
        mean, std = (theirs[key].flatten().tolist() for key in ("pixel_mean", "pixel_std"))
        # the order is not stored, but natural images are reddest
        return {"pixel_mean": mean, "pixel_std": std, "channel_order": "rgb" if mean[0] > mean[2] else "bgr"}
    text = config_text(contents)  # in whatever order, and over how many lines, mmengine wrote it
    mean, std = (re.search(rf"\b{name}=\[([\d.,\s]+)\]", text) for name in ("mean", "std"))
    order = re.search(r"\b(?:bgr_)?to_rgb=(True|False)", text)
    if not (mean and std and order):
        return {}
    mean, std = ([float(number) for number in found[1].split(",") if number.strip()] for found in (mean, std))
    return {"pixel_mean": mean, "pixel_std": std, "channel_order": "rgb" if order[1] == "True" else "bgr"}


def translate(theirs: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Our names and our order of rows for the tensors of another framework, and the keys that are not used.

    Raises ValueError listing all keys that no rule knows, and those that would get the same name.
    """
    table, names, unused, unknown = TABLES[source], {}, [], []
    if source == "mmdet" and is_regnet(theirs):
        table = REGNET + table
    for key in theirs:
        if any(re.fullmatch(pattern, key) for pattern in UNUSED):
            unused.append(key)
        elif ours := rename(rename(key, CAFFE2) or key, table):
            names[key] = ours
        else:
            unknown.append(key)
    twice = [key for key, ours in names.items() if list(names.values()).count(ours) > 1]
    if unknown or twice:
        raise ValueError(
            f"{source} weights: "
            + "; ".join(
                f"{len(keys)} keys {what}: {', '.join(keys)}"
                for keys, what in ((unknown, "have no place in our models"), (twice, "mean the same parameter"))
                if keys
            )
        )
    state = {ours: theirs[key] for key, ours in names.items()}
    for ours in list(state):
        state[ours] = reorder(ours, state[ours], source, state)
    if any(key.startswith("res2_0_branch2a_bn") for key in theirs):
        state |= missing_statistics(state)
    return state, unused


def is_regnet(theirs: Mapping[str, Tensor]) -> bool:
    """Whether mmdetection's keys are a RegNet's and not a ResNet's: its first convolution is 3 x 3. Raises ValueError
    for a RegNet with deformable convolutions."""
    found = "backbone.conv1.weight" in theirs and theirs["backbone.conv1.weight"].shape[2] == 3
    if found and any(key.startswith("backbone.layer") and ".conv_offset." in key for key in theirs):
        raise ValueError("mmdet weights: a RegNet with deformable convolutions, which timm's RegNets do not have")
    return found


def reorder(key: str, value: Tensor, source: str, state: Mapping[str, Tensor]) -> Tensor:
    """Rows in our order: background first for class logits, foreground alone for boxes and masks, anchors by ratio."""
    if ".predictor.class_logits." in key and source != "torchvision":
        return value.roll(1, dims=0)  # detectron2 and mmdetection keep the background last
    if source == "torchvision" and ".predictor.box_deltas." in key:
        return value[4:]
    if source == "torchvision" and ".predictor.mask_logits." in key:
        return value[1:]
    if source == "detectron2" and key.startswith(("rpn.head.objectness_logits.", "rpn.head.deltas.")):
        # theirs: size by size, and ratio by ratio within a size
        sizes = state["rpn.head.objectness_logits.bias"].shape[0] // RATIOS
        return value.unflatten(0, (sizes, RATIOS, -1)).transpose(0, 1).flatten(0, 2)
    if source == "detectron2" and key == "backbone.model.pos_embed":
        return value[:, -(math.isqrt(value.shape[1]) ** 2) :]  # without the class token's, which they never use
    if source == "mmdet" and key.startswith("backbone.model.layers.") and ".downsample." in key:
        # of four patches theirs: channel by channel row by row; timm's: column by column, all channels of each
        return value.unflatten(-1, (-1, 2, 2)).movedim((-1, -2), (-3, -2)).flatten(-3)
    return value


def missing_statistics(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caffe's batch norms are a scale and a shift: the running statistics under which ours are the same."""
    added = {}
    for key, weight in state.items():
        prefix = key.removesuffix(".weight")
        if re.search(r"(bn\d|downsample\.1)\.weight$", key) and f"{prefix}.running_mean" not in state:
            added[f"{prefix}.running_mean"] = torch.zeros_like(weight)
            added[f"{prefix}.running_var"] = torch.full_like(weight, 1 - 1e-5)  # the norm adds 1e-5
    return added


def without_eps(state: dict[str, Tensor]) -> None:
    """torchvision's first detectors run their batch norms with eps = 0: take ours off the variances."""
    for key in state:
        if key.endswith("running_var"):
            state[key] = state[key] - 1e-5


def widen(model: nn.Module, state: dict[str, Tensor], presets: Mapping[str, Any], how: str) -> dict[str, Tensor]:
    """The weights with a first convolution for as many channels as the backbone takes, where theirs takes three.

    how: "mean": every channel gets the mean of the three; "repeat": theirs one after the other, over and over; both are
    scaled by 3 / C, so that what comes out keeps its size. "new": it starts as the model was drawn. presets: the order
    and the scale that theirs was trained with; the model's own images have a standard deviation of about 1.

    Raises ValueError for a new convolution that is not trained.
    """
    found = [(n, m) for n, m in model.backbone.named_modules() if isinstance(m, nn.Conv2d)][:1]
    channels = getattr(model.backbone, "in_channels", 3)
    key = f"backbone.{found[0][0]}.weight" if found else ""
    if channels == 3 or key not in state or state[key].shape[1] != 3:
        return state
    weight, frozen = found[0][1].weight, not found[0][1].weight.requires_grad
    mend = "model.backbone.frozen_stages=0 trains it"
    if frozen and how == "new":
        raise ValueError(f"the first convolution would stay as it was drawn, for it is not trained: {mend}")
    if frozen:
        log.warning("the first convolution is widened to %d channels, but not trained: %s", channels, mend)
    log.info("the first convolution has %d channels instead of 3: weights.first_conv=%s", channels, how)
    if how == "new":
        return state | {key: weight.detach().clone()}
    theirs, std = state[key], torch.tensor(presets.get("pixel_std", RGB["pixel_std"]))
    if presets.get("channel_order") == "bgr":
        theirs, std = theirs.flip(1), std.flip(0)
    theirs = theirs * (torch.tensor(RGB["pixel_std"]) / std).to(theirs)[:, None, None]
    mean = theirs.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
    wide = mean if how == "mean" else theirs[:, torch.arange(channels) % 3]
    return state | {key: wide * (3 / channels)}
