"""Everything that changes during a run, from its preparation to its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from detector.config import build, config_errors
from detector.engine.optimizer import EMA, Schedule, build_optimizer
from detector.ops.layers import to_preferred_layout
from detector.runtime import World
from detector.settings import Runtime, Training

MODULES, PLAIN = (
    ("model", "optimizer", "scheduler", "scaler"),
    ("iteration", "evaluated", "nonfinite", "best", "metrics"),
)


@dataclass
class State:
    """The model and what trains it; `state_dict` is the heart of a checkpoint."""

    model: nn.Module
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    scaler: torch.amp.GradScaler
    iteration: int = 0  # optimiser steps done
    evaluated: int = 0  # iteration of the last evaluation
    nonfinite: int = 0  # steps skipped
    best: dict[str, Any] = field(default_factory=dict)  # metric, value, iteration
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)  # of the last evaluation

    @classmethod
    def create(
        cls,
        cfg: DictConfig,
        num_classes: int,
        schedule: Schedule,
        per_epoch: int,
        training: Training,
        runtime: Runtime,
        world: World,
        start: Callable[[nn.Module], None] | None = None,
    ) -> State:
        """Build what the config describes, on the device; `start` may fill the new model with weights."""
        model = build(cfg.model, "model", num_classes=num_classes, pad_multiple=cfg.data.pad_multiple)
        if start is not None:
            start(model)
        model = to_preferred_layout(model.to(world.device), world.device)
        scaler = torch.amp.GradScaler(world.device.type, enabled=runtime.precision == "fp16")
        factory = build(cfg.optimizer, "optimizer")
        optimizer = build_optimizer(factory, model, training, fused=not scaler.is_enabled())
        with config_errors("schedule"):
            factor = schedule.factor(per_epoch)
        scheduler = LambdaLR(optimizer, factor)
        ema = EMA(model, training.ema_decay) if training.ema_decay else None
        return cls(model, ema, optimizer, scheduler, scaler)

    @property
    def trained(self) -> nn.Module:
        """The weights to evaluate and to keep: the averaged ones if there are any."""
        return self.ema.model if self.ema else self.model

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

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
            setattr(self, name, state[name])
