"""Parameter groups, the optimiser over them, and the moving average of the weights."""

from __future__ import annotations

import copy
import functools
import inspect

import torch
from torch import Tensor, nn

from detector.config import ConfigError
from detector.engine.settings import Training

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, training: Training) -> list[dict]:
    """The trainable parameters, grouped by learning rate and weight decay.

    A key of `training.lr_multipliers` applies to the parameters that have it as a part of their dotted name; several
    multiply. Raises ConfigError for a key that no parameter has.
    """
    groups: dict[tuple[float, float], dict] = {}
    unused = set(training.lr_multipliers)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = f"{module_name}.{name}".split(".")
            matching = [key for key in training.lr_multipliers if key in parts]
            unused -= set(matching)
            if not parameter.requires_grad:
                continue
            scale = functools.reduce(lambda x, key: x * training.lr_multipliers[key], matching, 1.0)
            is_norm = isinstance(module, NORMS)
            plain = (is_norm and not training.decay_norms) or (
                name == "bias" and not is_norm and not training.decay_biases
            )
            key = (lr * scale, 0.0 if plain else weight_decay)
            group = groups.setdefault(key, {"params": [], "lr": key[0], "weight_decay": key[1]})
            if all(parameter is not other for other in group["params"]):
                group["params"].append(parameter)
    # offset predictors exist only with some RoI methods: their multiplier may stay in a recipe
    for key in unused - {"offset_predictor"}:
        raise ConfigError(f"training.lr_multipliers.{key}: no parameter has {key!r} as a part of its name")
    return list(groups.values())


def build_optimizer(
    factory: functools.partial, model: nn.Module, training: Training, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimiser of a `_partial_` torch.optim class, its lr scaled to the global batch.

    fused: one kernel for all parameters, unless the config says otherwise. Not with a GradScaler: if it skips the first
    step, a fused SGD never initialises its momentum.
    """
    settings = dict(factory.keywords)
    scale = training.batch_size / training.reference_batch if training.reference_batch else 1.0
    groups = parameter_groups(model, settings["lr"] * scale, settings.get("weight_decay", 0.0), training)
    if not groups:
        raise ConfigError("model: it has no trainable parameters")
    # on a CPU core AdamW takes 2.3 ms instead of 10.6 for the quickstart's 2.3 M parameters
    places = {p.device.type for group in groups for p in group["params"]}
    if fused and places <= {"cpu", "cuda"} and "fused" in inspect.signature(factory.func).parameters:
        settings.setdefault("fused", not settings.get("foreach") and not settings.get("differentiable"))
    try:
        return factory.func(groups, **settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"optimizer: {error}") from error


class EMA:
    """Exponential moving average of a model's weights: w <- d w + (1 - d) new, with d = min(decay, (1 + t) / (10 + t)).

    The ramp lets a short run forget its random start. `model` is the averaged copy, in eval mode.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, iteration: int) -> None:
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        averages, news = tensors(self.model), tensors(model)
        floats = [i for i, new in enumerate(news) if new.is_floating_point()]
        torch._foreach_lerp_([averages[i] for i in floats], [news[i] for i in floats], 1 - decay)
        for average, new in zip(averages, news, strict=True):
            if not new.is_floating_point():
                average.copy_(new)


def tensors(model: nn.Module) -> list[Tensor]:
    """All parameters and buffers."""
    return [*(p.data for p in model.parameters()), *model.buffers()]
