"""What a run starts from. Constructors read no files: models are filled here.

model.weights            a detector or a classifier, with the numbers that it was trained with
model.backbone.weights   the tensors of a body alone
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import nn

from detector.config import config_errors, literal
from detector.protocols import Named, Published
from detector.weights.architecture import apply_presets
from detector.weights.downloads import is_address, located
from detector.weights.loading import ForeignWeights, load_foreign, read_foreign, widen
from detector.weights.presets import RGB
from detector.weights.reading import read_file, state_dict_of
from detector.weights.transfer import Kept, fills_body, load_into
from detector.weights.zoo import find

log = logging.getLogger(__name__)
# what a backbone's weights expect, and where a config that does not say it stands
PIXELS = {"channel_order": None, "pixel_mean": None, "pixel_std": None, "backbone.stride_in_1x1": False}


class Weights(NamedTuple):
    """What `Start.read` returns: None for what is not given."""

    model: ForeignWeights | None  # of the file that `model.weights` names
    backbone: str | None  # `model.backbone.weights`: a file, or a name that the backbone's library knows
    categories: list[str] | None = None  # of the classes of the former, where something tells them
    name: str | None = None  # what `model.weights` said


@dataclass
class Start:
    """How the file that `model.weights` names is loaded: the top-level key `weights`.

    strict, reset_heads: see `load_into`. source, style: see `load_foreign`. categories: see `categories_of`.
    first_conv: how the first convolution of weights for three channels is widened to other images, see `widen`.
    """

    strict: bool = True
    reset_heads: bool = False
    source: str | None = None
    style: str | None = None
    categories: list[str] | None = None
    first_conv: Literal["mean", "repeat", "new"] = "mean"

    def read(self, cfg: DictConfig, chosen: Collection[str] = ()) -> Weights:
        """The weights that `cfg.model` starts from, the presets of `model.weights` put into it.

        chosen: keys, such as 'model.rpn.min_size', that the user set: they stay as they are.
        Afterwards `cfg.model.weights` is null, so that the config stands for the model without the file.
        """
        path, backbone = cfg.model.get("weights"), cfg.model.backbone.get("weights")
        if path is None:
            if backbone is not None:
                adopt_pixels(cfg.model, chosen)
            return Weights(None, backbone)
        with config_errors("model.weights"):
            if row := find(path):
                log.info("%s: %s; %s", path, row, row.settings)
            weights, source, categories, contents = read_foreign(path, self.source, self.style, self.categories)
        if source == "detector":
            warn_of_other_pixels(cfg.model, contents.get("config"))
        presets = {key: value for key, value in weights.presets.items() if f"model.{key}" not in chosen}
        model = OmegaConf.to_container(cfg.model, resolve=True)
        if model["backbone"].get("in_channels", 3) != 3:  # what is known of red, green and blue says nothing of these
            presets = {key: value for key, value in presets.items() if key not in RGB}
        apply_presets(model, presets)
        cfg.model = OmegaConf.create(literal(model | {"weights": None}))
        log.info("starting from %s with %s", path, ", ".join(f"{k}={v}" for k, v in presets.items()) or "its tensors")
        return Weights(weights, backbone, categories, path)

    def load(self, model: nn.Module, weights: Weights, categories: Sequence[str] | None = None) -> Kept:
        """Put what `read` returned into a new model, and say what was kept. The backbone's own weights are not even
        read where those of the model fill all of it. categories: names of the model's classes 1..K.

        Returns what was kept. Raises ConfigError, with the key, where a file is missing or does not fit, see
        `load_into`.
        """
        whole, backbone, theirs, _ = weights
        kept = Kept()
        if whole is not None:
            with config_errors("weights.first_conv"):
                whole = ForeignWeights(widen(model, *whole, self.first_conv), whole.presets)
        if backbone is not None:
            if whole is None or not fills_body(model, whole.state_dict):
                with config_errors(f"model.backbone.weights = {backbone}"):
                    body = read_backbone(model.backbone, backbone)
                    kept = load_into(model, widen(model, *body, self.first_conv), self.strict)
            else:
                log.info("model.backbone.weights=%s is not read: model.weights has the backbone", backbone)
        if whole is not None:
            with config_errors("model.weights"):
                found = load_into(model, whole.state_dict, self.strict, self.reset_heads, theirs, categories)
            kept = found.after(kept)
        if not all(part is None for part in (whole, backbone)):
            log.info("what the model keeps of the weights\n%s", kept)
        return kept


def adopt_pixels(model: DictConfig, chosen: Collection[str]) -> None:
    """Give `model` the pixel statistics that its backbone's library trained the weights with, where the user set none.
    A file may be of another training than the library's: there they are only named."""
    body = model.backbone
    of_library = getattr(get_class(body._target_), "pixels", None)
    if of_library is None or body.get("in_channels", 3) != 3:
        return
    known = {key: value for key, value in of_library(body.name).items() if f"model.{key}" not in chosen}
    differing = {key: value for key, value in known.items() if list(model.get(key) or RGB[key]) != value}
    if not differing:
        return
    settings = " ".join(f"model.{key}={value}".replace(" ", "") for key, value in differing.items())
    if is_file(body.weights):
        log.warning("timm's weights of %s were trained with %s; add it if those of this file were", body.name, settings)
    else:
        log.info("as timm's weights of %s were trained: %s", body.name, settings)
        model.update(differing)


def is_file(weights: str) -> bool:
    """Whether `model.backbone.weights` is a file or the address of one, and no name that the library knows."""
    return is_address(weights) or bool(Path(weights).suffix) or Path(weights).is_file()


def warn_of_other_pixels(model: DictConfig, config: Any) -> None:
    """Say so if the model is not given the images that a checkpoint of ours, with this config, was trained on."""
    before = OmegaConf.create((config or {}).get("model") or {})
    differing = {}
    for key, default in PIXELS.items():
        value, now = (OmegaConf.select(node, key, default=default) for node in (before, model))
        if value is not None and value != now:
            differing[key] = value
    if differing:
        added = {key: "+" * (OmegaConf.select(model, key) is None) for key in differing}  # Hydra's word for new keys
        settings = " ".join(f"'{added[key]}model.{key}={value}'" for key, value in differing.items())
        log.warning("model.weights were trained with other settings of the images than this run has: add %s", settings)


def read_backbone(backbone: nn.Module, weights: str) -> ForeignWeights:
    """The `backbone.` keys of a file that `load_foreign` reads or that has the names of the backbone's library, or the
    weights that this library publishes.

    Raises FileNotFoundError, and ValueError where the backbone knows no weights of that name.
    """
    if is_file(weights):
        if isinstance(backbone, Named):
            theirs = state_dict_of(read_file(located(weights) if is_address(weights) else weights))
            if (own := backbone.named(theirs)) is not None:
                return ForeignWeights({f"backbone.{key}": value for key, value in own.items()}, {})
        state, presets = load_foreign(weights)
        return ForeignWeights({key: value for key, value in state.items() if key.startswith("backbone.")}, presets)
    if not isinstance(backbone, Published):
        raise ValueError(f"{weights!r} is no file, and no library publishes weights of {type(backbone).__name__}")
    return ForeignWeights({f"backbone.{key}": value for key, value in backbone.published(weights).items()}, {})
