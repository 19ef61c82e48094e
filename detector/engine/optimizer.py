"""Parameter groups, the optimiser over them, the moving average of the weights, and schedules of the learning rate.

A schedule is the length of a run and a factor on the learning rate, a pure function of the iteration. Warm-up is linear
from `warmup_factor` to 1 (Goyal et al. 2017, "Accurate, Large Minibatch SGD"), then
    Step       f(t) = gamma ^ (number of milestones <= t)
    Cosine     f(t) = e + (1 - e) (1 + cos(pi u)) / 2,  u = (t - warmup) / (T - warmup)   (Loshchilov & Hutter, SGDR)
    OneCycle   rises and falls by half a cosine                                (Smith & Topin 2018, Super-Convergence)
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detector.config import ConfigError
from detector.ops.checks import require
from detector.protocols import Layered
from detector.settings import Length, Training, to_iterations

NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm, nn.LayerNorm),
)


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, training: Training) -> list[dict]:
    """The trainable parameters, grouped by learning rate and weight decay, those of `training.freeze` apart: a fused
    SGD wants momentum of all of a group or of none.

    A key of `training.lr_multipliers` applies to the parameters that have it as a part of their dotted name; several
    multiply, and so does `layer_factors`. Raises ConfigError for a key that no parameter has.
    """
    factors = layer_factors(model, training.layer_decay) if training.layer_decay else {}
    groups: dict[tuple[float, float, bool], dict] = {}
    unused = set(training.lr_multipliers)
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            parts = f"{module_name}.{name}".split(".")
            matching = [key for key in training.lr_multipliers if key in parts]
            unused -= set(matching)
            if not parameter.requires_grad:
                continue
            scale = functools.reduce(lambda x, key: x * training.lr_multipliers[key], matching, 1.0)
            scale *= factors.get(".".join(parts), 1.0)
            is_norm = isinstance(module, NORMS) or name == "pos_embed"  # of ViTs, which no recipe decays alone
            plain = (is_norm and not training.decay_norms) or (
                name == "bias" and not is_norm and not training.decay_biases
            )
            frozen = any(".".join(parts).startswith(f"{part}.") for part in training.freeze)
            key = (lr * scale, 0.0 if plain else weight_decay, frozen)
            group = groups.setdefault(key, {"params": [], "lr": key[0], "weight_decay": key[1]})
            if all(parameter is not other for other in group["params"]):
                group["params"].append(parameter)
    # offset predictors exist only with some RoI methods: their multiplier may stay in a recipe
    for part in unused - {"offset_predictor"}:
        raise ConfigError(f"training.lr_multipliers.{part}: no parameter has {part!r} as a part of its name")
    return list(groups.values())


def layer_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """decay ^ (L - l) for the parameters of layer l = 0 .. L - 1 of the backbone, by name (Clark et al. 2020, ELECTRA;
    ViTDet): the last layer learns at `decay`, what stands behind the backbone at 1. Raises ConfigError for a backbone
    that does not tell its layers."""
    if not isinstance(model.backbone, Layered):
        kind = type(model.backbone).__name__
        raise ConfigError(
            f"training.layer_decay = {decay}: {kind} does not tell its layers apart; null, or a backbone of timm, such "
            "as backbone@model.backbone=swin_tiny"
        )
    layers = model.backbone.layers()
    count = max(layers.values()) + 1
    return {f"backbone.{name}": decay ** (count - layer) for name, layer in layers.items()}


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


def trained_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


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
    """All parameters and buffers, which know what is written to them."""
    return [*(p.detach() for p in model.parameters()), *model.buffers()]


# ---------------------------------------------------------------------------------------------------- learning rates


@dataclass(frozen=True)
class Schedule(ABC):
    """Length and warm-up, common to all. Lengths: an int (iterations), "3 epochs", or a float, a share of the run."""

    max_iterations: int | None = None
    max_epochs: float | None = None
    warmup: Length = 0
    warmup_factor: float = 0.001

    def __post_init__(self) -> None:
        if (self.max_iterations is None) == (self.max_epochs is None):
            both = self.max_epochs is not None
            hint = "schedule.max_iterations=null or schedule.max_epochs=null leaves the other" if both else "neither is"
            given = f"max_iterations = {self.max_iterations}, max_epochs = {self.max_epochs}"
            raise ValueError(f"{given}: give exactly one of them; {hint}")
        name = "max_epochs" if self.max_iterations is None else "max_iterations"
        require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(0 <= self.warmup_factor <= 1, "warmup_factor", self.warmup_factor, "in [0, 1]")
        to_iterations(self.warmup, 1, 1, "warmup")

    def total(self, per_epoch: int) -> int:
        """The run's length in iterations."""
        return self.max_iterations or max(1, round((self.max_epochs or 0) * per_epoch))

    def factor(self, per_epoch: int) -> Callable[[int], float]:
        """The factor on the learning rate as a function of the iteration, 0 for the first."""
        total = self.total(per_epoch)
        warmup = to_iterations(self.warmup, per_epoch, total, "warmup")
        require(warmup < total, "warmup", self.warmup, f"shorter than the run of {total} iterations")
        after = self.after_warmup(warmup, total, per_epoch)

        def factor(iteration: int) -> float:
            if iteration < warmup:
                return self.warmup_factor + (1 - self.warmup_factor) * iteration / warmup
            return after(iteration)

        return factor

    @abstractmethod
    def after_warmup(self, warmup: int, total: int, per_epoch: int) -> Callable[[int], float]:
        """The factor as a function of the iteration, for those from `warmup` to `total`; lengths in iterations."""


@dataclass(frozen=True)
class Step(Schedule):
    """Constant, times `gamma` at each milestone."""

    milestones: Sequence[Length] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gamma > 0, "gamma", self.gamma, "above 0")
        for index, milestone in enumerate(self.milestones):
            to_iterations(milestone, 1, 1, f"milestones[{index}]")

    def after_warmup(self, warmup: int, total: int, per_epoch: int) -> Callable[[int], float]:
        milestones = [to_iterations(m, per_epoch, total, "milestones") for m in self.milestones]
        return lambda iteration: self.gamma ** sum(m <= iteration for m in milestones)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from 1 down to `final_factor`."""

    final_factor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.final_factor <= 1, "final_factor", self.final_factor, "in [0, 1]")

    def after_warmup(self, warmup: int, total: int, per_epoch: int) -> Callable[[int], float]:
        return lambda iteration: half_cosine(1.0, self.final_factor, (iteration - warmup) / (total - warmup))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Half a cosine up from `start_factor` to 1 at `peak`, and another down to `final_factor`.

    A run too short for a rise, of which `peak` is less than half an iteration, starts at 1.
    """

    peak: Length = 0.15
    start_factor: float = 0.04
    final_factor: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        instead = f"0: a one-cycle schedule rises until its peak instead: set 'schedule.peak={self.warmup}'"
        require(self.warmup == 0, "warmup", self.warmup, instead)
        for name in ("start_factor", "final_factor"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        to_iterations(self.peak, 1, 1, "peak")

    def after_warmup(self, warmup: int, total: int, per_epoch: int) -> Callable[[int], float]:
        peak = to_iterations(self.peak, per_epoch, total, "peak")
        require(peak < total, "peak", self.peak, f"inside the run of {total} iterations")

        def factor(iteration: int) -> float:
            if iteration < peak:
                return half_cosine(self.start_factor, 1.0, iteration / peak)
            return half_cosine(1.0, self.final_factor, (iteration - peak) / (total - peak))

        return factor


def half_cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end` as `share` goes from 0 to 1; `end` beyond."""
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2
