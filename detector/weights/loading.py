"""From somebody's checkpoint to a model of ours: translate, check, load."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import get_weight

from detector.weights.keymaps import (
    CAFFE2_TO_DETECTRON2,
    DETECTRON2,
    MMDET,
    TORCHVISION,
    UNUSED,
    compile_table,
    detectron2_resnet,
    rename,
    resnet,
)
from detector.weights.presets import RGB, has, presets_of
from detector.weights.reading import read_file, state_dict_of

log = logging.getLogger(__name__)
SOURCES = ("torchvision", "detectron2", "mmdet", "detector")  # the last are our own checkpoints
TABLES = {
    "torchvision": compile_table(TORCHVISION | resnet("", "backbone.")),  # the latter are classifiers
    "detectron2": compile_table(DETECTRON2 | detectron2_resnet("", "backbone.")),
    "mmdet": compile_table(MMDET | resnet("", "backbone.")),
}
CAFFE2 = compile_table(CAFFE2_TO_DETECTRON2)
RATIOS = 3  # of the anchors; all published models have 0.5, 1 and 2
COUNTER = "num_batches_tracked"  # of batch norms; frozen ones have none and nothing depends on it
WITHOUT_EPS = r"_fpn_coco-[0-9a-f]{8}|RCNN_ResNet50_FPN_Weights\.COCO"  # torchvision's first published detectors
BODY = ("backbone.", "box_head.trunk.layer4.")  # what a classifier's weights fill: the latter in C4 models
OFFSETS = ".conv2.offset."  # of deformable convolutions: no classifier has them
HEADS = r"(box|mask|keypoint)_head\.(stages\.\d+\.)?predictor\."  # what depends on the number of classes


class ForeignWeights(NamedTuple):
    """What `load_foreign` returns."""

    state_dict: dict[str, Tensor]  # under our names, in our order of classes and anchors
    presets: dict[str, Any]  # {key of the model config: value} that the weights were trained with


class WrongShape(NamedTuple):
    key: str
    given: tuple[int, ...]
    expected: tuple[int, ...]  # the model's

    def __str__(self) -> str:
        return f"{self.key}: {self.given}, expected {self.expected}"


class Misfit(NamedTuple):
    """How a state dict differs from a model's."""

    missing: list[str]
    extra: list[str]
    shapes: list[WrongShape]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        return "; ".join(f"{len(keys)} {kind}: {', '.join(map(str, keys))}" for kind, keys in zip(KINDS, self) if keys)


KINDS = ("missing", "not of this model", "of another shape")


def load_foreign(
    path_or_state_dict: str | Path | Mapping[str, Any], source: str | None = None, style: str | None = None
) -> ForeignWeights:
    """Weights of torchvision, detectron2 or mmdetection as a state dict of our model, with the settings they need.

    Args:
        path_or_state_dict: a file (.pth, .pt, detectron2's and Caffe2's .pkl, .safetensors), what was in it, or a name
            of torchvision's such as 'MaskRCNN_ResNet50_FPN_Weights.COCO_V1', which is downloaded. Nothing in a file
            is executed.
        source: 'torchvision', 'detectron2', 'mmdet', or 'detector' (our own checkpoints); None looks at the keys.
        style: 'caffe' or 'pytorch': where bottlenecks stride and how images are normalised. None takes what the file
            says, else what that framework's published models of that kind have.

    Returns the state dict and the presets, `{"rpn.anchor_rounding": True, ...}`. Keys that a model has no use for are
    logged. Classifiers give `backbone.` keys alone.

    Raises FileNotFoundError, and ValueError for an unknown source or for keys that no rule knows, all of them listed.
    """
    return read_foreign(path_or_state_dict, source, style)[0]


def read_foreign(
    path_or_state_dict: str | Path | Mapping[str, Any], source: str | None = None, style: str | None = None
) -> tuple[ForeignWeights, str]:
    """What `load_foreign` returns, and whose weights they are: one of SOURCES."""
    if source not in (None, *SOURCES):
        raise ValueError(f"source={source!r}: expected one of {', '.join(SOURCES)}, or None to recognise it")
    if style not in (None, "caffe", "pytorch"):
        raise ValueError(f"style={style!r}: expected 'caffe', 'pytorch' or None")
    is_path = isinstance(path_or_state_dict, str | Path)
    if is_path and re.fullmatch(r"\w+_Weights\.\w+", str(path_or_state_dict)):
        contents = get_weight(str(path_or_state_dict)).get_state_dict()
    else:
        contents = read_file(path_or_state_dict) if is_path else path_or_state_dict
    theirs = state_dict_of(contents)
    source = source or recognise(theirs)
    style = style or style_in(contents, Path(path_or_state_dict).name if is_path else "")
    if source == "detector":
        return ForeignWeights(theirs, {}), source
    state, unused = translate(theirs, source)
    if unused:
        log.info("not used by the model: %s", ", ".join(unused))
    if is_path and source == "torchvision" and re.search(WITHOUT_EPS, str(path_or_state_dict)):
        without_eps(state)
    presets = presets_of(source, state, style)
    return ForeignWeights(state, presets | pixels_in(contents, theirs)), source


def recognise(state: Mapping[str, Tensor]) -> str:
    """The framework that names parameters like this. Raises ValueError if none does."""
    marks = {
        "detector": ("rpn.head.objectness_logits.", "rpn.head.deltas."),
        "detectron2": ("proposal_generator.", "backbone.bottom_up.", "backbone.res", "stem.", "res2"),
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
    names, unused, unknown = {}, [], []
    for key in theirs:
        if any(re.fullmatch(pattern, key) for pattern in UNUSED):
            unused.append(key)
        elif ours := rename(rename(key, CAFFE2) or key, TABLES[source]):
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


def misfit(model: nn.Module, state: Mapping[str, Tensor], parts: tuple[str, ...] = ("",)) -> Misfit:
    """Compare names and shapes with the model's `parts` (prefixes); batch norm's counters count for nothing."""
    wanted = {key: value for key, value in model.state_dict().items() if key.startswith(parts)}
    missing = [key for key in wanted if key not in state and not key.endswith(COUNTER)]
    extra = [key for key in state if key not in wanted and not key.endswith(COUNTER)]
    shapes = [
        WrongShape(key, tuple(state[key].shape), tuple(wanted[key].shape))
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape and not is_flat(state[key], wanted[key])
    ]
    return Misfit(missing, extra, shapes)


def is_flat(value: Tensor, wanted: Tensor) -> bool:
    """Whether `value` [out, C h w] is the weight of a fully connected layer on RoIs, wanted as [out, C, h, w]."""
    return value.dim() == 2 and wanted.dim() == 4 and value.shape == wanted.flatten(1).shape


def load_into(
    model: nn.Module, state: Mapping[str, Tensor], strict: bool = True, reset_heads: bool = False
) -> list[str]:
    """Load weights under our names into a model.

    Args:
        strict: every key of the model must be there with its shape, and no other; False loads what fits and warns.
        reset_heads: predictors whose number of classes differs keep their fresh initialisation, and this is logged.

    A state dict of `backbone.` keys alone fills the backbone and leaves the rest as it is.
    Returns the keys that were loaded. Raises ValueError listing the keys that do not fit.
    """
    state = dict(state)
    if reset_heads:
        wanted = model.state_dict()
        reset = [k for k in wanted if re.match(HEADS, k) and k in state and state[k].shape != wanted[k].shape]
        state |= {key: wanted[key] for key in reset}
        if reset:
            log.warning("initialised anew, as asked, for another number of classes: %s", ", ".join(reset))
    state, found = fit(model, state)
    if found:
        if strict:
            raise ValueError(
                "weights do not fit the model: is it the one that they are of? weights.strict=false loads what fits, "
                f"weights.reset_heads=true initialises heads for another number of classes anew. {found}"
            )
        log.warning("loading what fits of the weights; %s", found)
    unfit = {*found.extra, *(wrong.key for wrong in found.shapes)}
    fitting = {key: value for key, value in state.items() if key not in unfit}
    model.load_state_dict(fitting, strict=False)
    return list(fitting)


def fit(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Misfit]:
    """The weights as this model has them, and how they differ from it.

    A classifier's, `backbone.` keys alone, are compared with the model's body. In a C4 model stage 5 is in the box
    head's trunk, a stage that the model lacks is left out, and offsets of deformable convolutions start by themselves.
    """
    if not all(key.startswith("backbone.") for key in state):
        return state, misfit(model, state)
    wanted = model.state_dict()
    if has(wanted, BODY[1]) and not has(wanted, "backbone.layer4."):
        state = {re.sub(r"^backbone\.layer4\.", BODY[1], key): value for key, value in state.items()}
    layers = {key.split(".")[1] for key in wanted if key.startswith("backbone.layer")}
    state = {k: v for k, v in state.items() if not k.startswith("backbone.layer") or k.split(".")[1] in layers}
    found = misfit(model, state, BODY)
    return state, found._replace(missing=[key for key in found.missing if OFFSETS not in key])


def fills_body(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether these weights have all that a classifier's would fill."""
    missing, _, shapes = fit(model, state)[1]
    lacking = [*missing, *(wrong.key for wrong in shapes)]
    return not any(key.startswith(BODY) and OFFSETS not in key for key in lacking)
