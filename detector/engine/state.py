"""What a run keeps from its preparation to its end, and what changes in it from step to step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from detector.config import ConfigError, build, config_errors
from detector.data import CocoDataset
from detector.engine.freezing import Frozen, frozen_parts
from detector.engine.optimizer import EMA, Schedule, build_optimizer, trained_by
from detector.ops.layers import to_preferred_layout
from detector.runtime import World
from detector.settings import Evaluation, Runtime, Training, to_iterations
from detector.weights import Kept

MODULES, PLAIN = (
    ("model", "optimizer", "scheduler", "scaler"),
    ("iteration", "evaluated", "nonfinite", "best", "metrics", "operating_point"),
)


@dataclass(frozen=True)
class Run:
    """What the parts of a training run share, and none of them changes."""

    cfg: DictConfig  # as it was checked; those of its nodes that are built already stand below
    runtime: Runtime
    training: Training
    evaluation: Evaluation
    schedule: Schedule
    world: World
    folder: Path
    train_set: CocoDataset
    val_set: CocoDataset

    @property
    def config(self) -> dict[str, Any]:
        """`cfg` as plain values, as checkpoints have it."""
        plain: Any = OmegaConf.to_container(self.cfg, resolve=True)
        return plain

    @cached_property
    def per_epoch(self) -> int:
        """Iterations in an epoch."""
        return max(1, round(len(self.train_set) / self.training.batch_size))

    @cached_property
    def total(self) -> int:
        """Iterations of the whole run."""
        return self.schedule.total(self.per_epoch)

    @cached_property
    def thaw_at(self) -> int:
        """The iterations that what is frozen waits; those of the whole run where it never thaws."""
        if self.training.thaw_at is None:
            return self.total
        thaw = to_iterations(self.training.thaw_at, self.per_epoch, self.total, "training.thaw_at")
        if not 0 < thaw < self.total:
            raise ConfigError(
                f"training.thaw_at = {self.training.thaw_at}: is iteration {thaw}, which is not inside the run of "
                f"{self.total} iterations; null: freeze for all of it"
            )
        return thaw

    @cached_property
    def save_every(self) -> int:
        """Iterations between numbered checkpoints."""
        return to_iterations(self.runtime.checkpoint_every, self.per_epoch, self.total)

    @cached_property
    def evaluate_every(self) -> int:
        """Iterations between evaluations; there is one at the end, too."""
        every = self.evaluation.every
        return to_iterations(every, self.per_epoch, self.total) if every else self.total


@dataclass
class State:
    """The model and what trains it; `state_dict` is the heart of a checkpoint."""

    model: nn.Module
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    frozen: Frozen
    filled: Collection[str]  # names of the tensors that weights gave
    iteration: int = 0  # optimiser steps done
    evaluated: int = 0  # iteration of the last evaluation
    nonfinite: int = 0  # steps skipped
    best: dict[str, Any] = field(default_factory=dict)  # metric, value, iteration
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # of the last evaluation
    operating_point: dict[str, Any] = field(default_factory=dict)  # of the best evaluation so far; rank 0 alone has it
    hopeless: bool = False  # given up by the sweep that the run is a trial of
    parameters: list[Tensor] = field(init=False)  # what the optimiser trains, frozen or not

    def __post_init__(self) -> None:
        self.parameters = trained_by(self.optimizer)

    @classmethod
    def create(cls, run: Run, start: Callable[..., Kept] | None = None) -> State:
        """Build what the config describes, on the device; `start(model, categories=)` may fill it with weights, and
        says what it kept."""
        cfg, training, device = run.cfg, run.training, run.world.device
        categories = run.train_set.categories
        model = build(cfg.model, "model", num_classes=len(categories), pad_multiple=cfg.data.pad_multiple)
        kept = start(model, categories=categories) if start is not None else Kept()
        model = to_preferred_layout(model.to(device), device)
        scaler = torch.amp.GradScaler(device.type, enabled=run.runtime.precision == "fp16")
        factory = build(cfg.optimizer, "optimizer")
        optimizer = build_optimizer(factory, model, training, fused=not scaler.is_enabled())
        with config_errors("schedule"):
            factor = run.schedule.factor(run.per_epoch)
        scheduler = LambdaLR(optimizer, factor)
        ema = EMA(model, training.ema_decay) if training.ema_decay else None
        frozen = frozen_parts(model, training.freeze, trained_by(optimizer))
        return cls(model, ema, optimizer, scheduler, scaler, frozen, {*kept.kept, *kept.rows})

    def set_mode(self, run: Run) -> None:
        """Training mode, as the iteration that comes next has it: with frozen parts before `training.thaw_at`."""
        self.model.train()
        self.frozen.set_mode(self.iteration < run.thaw_at)

    @property
    def trained(self) -> nn.Module:
        """The weights to evaluate and to keep: the averaged ones if there are any."""
        return self.ema.model if self.ema else self.model

    def is_exhausted(self, run: Run) -> bool:
        """Whether the last `training.patience` evaluations brought nothing better, or a sweep wants no more of it: this
        ends a run early."""
        waited = self.evaluated - self.best.get("iteration", self.evaluated)
        tired = run.training.patience is not None and waited >= run.training.patience * run.evaluate_every
        return self.hopeless or tired

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name).state_dict() for name in MODULES}
        state["ema"] = self.ema.model.state_dict() if self.ema else None
        return state | {name: getattr(self, name) for name in PLAIN}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in MODULES:
            getattr(self, name).load_state_dict(state[name])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"])
        for name in PLAIN:
            setattr(self, name, state[name] if name != "operating_point" else state.get(name, {}))  # older have none
