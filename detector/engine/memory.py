"""How much memory a step takes, and the batch that fits: `training.batch_size=auto`."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig

from detector.config import build
from detector.data import CocoDataset, collate
from detector.engine import run_folder, setup
from detector.engine.journal import forget_peak, memory_mb
from detector.ops.layers import to_preferred_layout
from detector.runtime import autocast, free_memory, start_ranks
from detector.settings import Runtime
from detector.structures import to_device


class Step(NamedTuple):
    """One training step, as it was measured."""

    device: str
    images: int
    seconds: float
    loading: float  # seconds to load an image, in one process
    fixed: float  # MB for weights, gradients and the optimiser
    per_image: float  # MB
    free: float  # MB

    def batch(self) -> int:
        """How many images fit into four fifths of the memory: a power of two, or 1."""
        fit = (0.8 * self.free - self.fixed) / max(self.per_image, 1)
        return 2 ** int(math.log2(fit)) if fit >= 2 else 1

    def epoch(self, length: int, workers: int) -> float:
        """Seconds of an epoch of so many images; without workers they are loaded between the steps."""
        computing = self.seconds / self.images
        return length * (max(computing, self.loading / workers) if workers else computing + self.loading)


def measure_step(cfg: DictConfig, dataset: CocoDataset, images: int = 2) -> Step:
    """Train one step on the device of the run; on a GPU a second one, as the first one waits for its kernels."""
    runtime = build(cfg.runtime, "runtime")
    device = start_ranks(runtime).device
    free = free_memory(device)[0] / 2**20  # before the model takes its part, which is counted as `fixed`
    began = time.perf_counter()
    samples = [dataset[int(i)] for i in np.linspace(0, len(dataset) - 1, images)]
    loading = (time.perf_counter() - began) / images
    size = None if cfg.data.pad_to is None else tuple(cfg.data.pad_to)
    batch, targets = collate(samples, cfg.data.pad_multiple, size)
    model = build(cfg.model, "model", num_classes=len(dataset.categories), pad_multiple=cfg.data.pad_multiple)
    model = to_preferred_layout(model.to(device), device).train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4 / 2**20
    weights = sum(p.numel() for p in model.parameters()) * 4 / 2**20
    fixed = weights + trained * (3 if "adam" in str(cfg.optimizer.get("_target_")).lower() else 2)
    before = seconds = 0.0
    for _ in range(2 if device.type == "cuda" else 1):
        model.zero_grad()
        forget_peak(device)
        before = memory_mb(device)
        began = time.perf_counter()
        with autocast(device, runtime.precision):
            losses = model(to_device(batch, device), to_device(targets, device))
        sum(losses.values()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    per_image = max(0.0, memory_mb(device) - before - trained * (device.type != "cuda")) / images
    return Step(str(device), images, seconds, loading, fixed, per_image, free)


def choose_batch(cfg: DictConfig, runtime: Runtime) -> str:
    """Replace `training.batch_size=auto` in `cfg` by a number: that of the run that goes on, else the most images that
    fit into memory, on every rank and in each of `training.accumulate` parts. Returns what to tell of it, "" where the
    number was given.

    Two images are trained on once, with the run's own model, precision and augmentation; a GPU then tries the batch
    itself, and takes half of what does not fit. Not more than the data set has.
    """
    if cfg.training.batch_size != "auto":
        return ""
    folder = Path(cfg.run_dir)
    if (found := run_folder.find(cfg.resume, folder)) is not None:
        cfg.training.batch_size = found["config"]["training"]["batch_size"]
        return f"training.batch_size = {cfg.training.batch_size}, as this run began"
    tried = copy.deepcopy(cfg)
    tried.training.batch_size = tried.training.accumulate  # for what is checked before
    setup.preflight(tried, build(tried.training, "training"))
    world = start_ranks(runtime)
    train_set, val_set = setup.datasets(tried)
    setup.fit(tried, train_set, val_set, build(tried.evaluation, "evaluation"))
    step = measure_step(tried, train_set)
    if world.device.type == "cpu":  # the ranks share it
        step = step._replace(free=step.free / world.size)
    parts = world.size * cfg.training.accumulate
    each = min(step.batch(), 2 ** int(math.log2(max(1, len(train_set) // parts))))
    while world.device.type == "cuda" and each > 1:
        try:
            measure_step(tried, train_set, images=each)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            each //= 2
    each = min(world.gather(each))
    cfg.training.batch_size = each * parts
    figures = f"each takes {step.per_image:.0f} MB, the model {step.fixed:.0f}, {step.free:.0f} are free"
    return f"training.batch_size = {cfg.training.batch_size}: {each} images at once; {figures}"
