"""`model.weights=FILE`: a run that starts from somebody's weights, with the numbers that they were trained with."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf
from torch import nn

from detector.config import literal
from detector.weights.architecture import apply_presets
from detector.weights.loading import ForeignWeights, load_foreign, load_into

log = logging.getLogger(__name__)


@dataclass
class Start:
    """How the file that `model.weights` names is loaded: the top-level key `weights`.

    strict: every key must fit; false loads what fits. reset_heads: predictors for another number of classes start anew.
    source, style: see `load_foreign`.
    """

    strict: bool = True
    reset_heads: bool = False
    source: str | None = None
    style: str | None = None

    def read(self, cfg: DictConfig, chosen: Collection[str] = ()) -> ForeignWeights | None:
        """The weights that `cfg.model` starts from, their presets put into it; None without `model.weights`.

        chosen: keys, such as 'model.rpn.min_size', that the user set: they stay as they are.
        Afterwards `cfg.model.weights` is null, so that the config stands for the model without the file.
        """
        path = cfg.model.get("weights")
        if path is None:
            return None
        weights = load_foreign(path, self.source, self.style)
        presets = {key: value for key, value in weights.presets.items() if f"model.{key}" not in chosen}
        model = OmegaConf.to_container(cfg.model, resolve=True)
        apply_presets(model, presets)
        cfg.model = OmegaConf.create(literal(model | {"weights": None}))
        log.info("starting from %s with %s", path, ", ".join(f"{k}={v}" for k, v in presets.items()) or "its tensors")
        return weights

    def load(self, model: nn.Module, weights: ForeignWeights | None) -> None:
        """Put what `read` returned into the model. Raises ValueError as `load_into`."""
        if weights is not None:
            loaded = load_into(model, weights.state_dict, self.strict, self.reset_heads)
            log.info("loaded %d tensors", len(loaded))
