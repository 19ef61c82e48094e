"""The settings of a run that build nothing: configs/runtime, configs/data and train.yaml.

A length of training is written as an int (iterations), a string "3 epochs", or a float in (0, 1), a share of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from detector.ops.checks import require

Length = int | float | str
if TYPE_CHECKING:
    BatchSize = int  # `engine.memory` puts a number there before anything is built
else:
    BatchSize = int | Literal["auto"]
# keys of a run's config that do not change what it learns: where it lies, how it is executed, watched and measured, and
# where its data come from. With the seed these may differ between runs of one method.
UNLEARNT = ("name", "run_dir", "resume", "runtime", "logger", "evaluation", "data.prepare", "data.cache")
UNLEARNT += ("model.backbone.checkpointing",)


COCO_LIMITS = (1, 10, 100)  # detections of a class in an image that COCO's AP and AR count
LVIS_LIMIT = 300  # detections of an image, whatever their class, that LVIS's AP counts


def check_limits(limits: Sequence[int], name: str = "max_detections") -> tuple[int, ...]:
    """The limits as a tuple. Raises ValueError unless they are whole numbers from 1 on that grow."""
    whole = all(isinstance(limit, int) and not isinstance(limit, bool) for limit in limits)
    grows = whole and all(a < b for a, b in zip((0, *limits), limits))
    require(len(limits) > 0 and grows, name, list(limits), f"growing whole numbers, such as {list(COCO_LIMITS)}")
    return tuple(limits)


def to_iterations(length: Length, per_epoch: int, total: int | None = None, name: str = "length") -> int:
    """A length in iterations.

    Args:
        per_epoch: iterations in an epoch.
        total: what a share refers to; None where shares make no sense.

    Raises ValueError, naming `name`, for what is not a length.
    """
    if isinstance(length, int) and not isinstance(length, bool):
        require(length >= 0, name, length, "at least 0")
        return length
    if isinstance(length, float) and total is not None:
        require(0 <= length <= 1, name, length, "an int (iterations), a share between 0.0 and 1.0, or like '3 epochs'")
        return round(length * total)
    match = re.fullmatch(r"\s*([0-9.]+)\s*(?:epochs?|ep)\s*", str(length))
    require(match is not None, name, length, "an int (iterations) or like '3 epochs'")
    return round(float(match[1]) * per_epoch)


@dataclass(frozen=True)
class Split:
    """Where the files of data.train or data.val are, below data.root."""

    images: str | list[str]
    annotations: str | list[str]


@dataclass(frozen=True)
class Data:
    """A data set and how it is read: configs/data/base.yaml says what each means."""

    root: str
    prepare: str | None
    train: Split
    val: Split
    masks: bool
    keypoints: bool
    mask_size: int
    keep_empty: bool
    on_error: Literal["raise", "skip"]
    max_pixels: int
    channels: int
    intensity: Any
    page: int | None
    shown: list[int] | None
    cache: str | None
    sampling: Literal["uniform", "repeat_factor", "class_balanced"]
    repeat_threshold: float
    group_by_aspect: bool
    pad_multiple: int
    pad_to: tuple[int, int] | None
    neighbours: int = 0
    attributes: bool | list[str] = False


@dataclass(frozen=True)
class Runtime:
    """Where and how the run is executed. Nothing here changes what is learned, beyond rounding."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    workers: int | Literal["auto"] = "auto"  # data-loading processes of each rank; auto: see runtime.data_workers
    threads: int | Literal["auto"] | None = None  # CPU threads of each rank; null: all; auto: as cores are free
    compile: bool = False  # backbone, neck and the RPN's layers, whose shapes stay
    deterministic: bool = False  # refuse GPU kernels that are not reproducible
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_nonfinite: int = 10  # steps that may be skipped before the run stops after all
    log_every: int = 20
    histograms_every: int = 200
    pictures_every: int | None = 500
    checkpoint_every: Length = "1 epoch"
    keep: int = 2  # numbered checkpoints to keep beside last.pt and best.pt
    tensorboard: bool = True
    verbosity: Literal["quiet", "normal", "debug"] = "normal"  # quiet: warnings alone; debug: every step, every part

    def __post_init__(self):
        known = re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device)
        require(known is not None, "device", self.device, "auto, cpu, mps, cuda or cuda:N")
        for name in ("workers", "max_nonfinite", "keep"):
            value = getattr(self, name)
            require((name == "workers" and value == "auto") or value >= 0, name, value, "at least 0")
        for name in ("threads", "log_every", "histograms_every", "pictures_every"):
            value = getattr(self, name)
            chosen_later = value is None or (name == "threads" and value == "auto")
            require(chosen_later or value >= 1, name, value, "at least 1")
        to_iterations(self.checkpoint_every, 1, 1, "checkpoint_every")


@dataclass(frozen=True)
class Training:
    """What one step does."""

    batch_size: BatchSize = 16  # images in one optimiser step, over all ranks and accumulation steps
    accumulate: int = 1  # micro-batches in a step
    reference_batch: int | None = 16  # optimizer.lr is meant for this batch and scaled linearly; null: taken as it is
    clip_norm: float | None = None
    clip_value: float | None = None
    ema_decay: float | None = None  # evaluate an exponential moving average of the weights
    decay_norms: bool = False  # weight decay on normalisation layers
    decay_biases: bool = False
    lr_multipliers: dict[str, float] = field(default_factory=dict)  # by part of a parameter's name: {backbone: 0.1}
    layer_decay: float | None = None  # factor on the learning rate from each layer of the backbone to the one before it
    freeze: list[str] = field(default_factory=list)  # parts of the model that do not learn: [backbone, rpn]
    thaw_at: Length | None = None  # when they begin to; null: never
    patience: int | None = None  # evaluations in a row that may bring nothing better; then the run ends
    # factors on the loss of RoIs by the name of their class, others 1; auto: from how often a class occurs
    class_weights: dict[str, float] | Literal["auto"] | None = None

    def __post_init__(self):
        for name in ("batch_size", "accumulate", "reference_batch", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        fits = self.batch_size % self.accumulate == 0
        require(fits, "accumulate", self.accumulate, f"a divisor of batch_size = {self.batch_size}")
        for name in ("clip_norm", "clip_value"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "above 0, or null")
        require(self.ema_decay is None or 0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "in (0, 1), or null")
        for key in ("lr_multipliers", "class_weights"):
            factors = getattr(self, key)
            for name, value in factors.items() if isinstance(factors, Mapping) else ():
                require(value >= 0, f"{key}.{name}", value, "at least 0")
        require(self.layer_decay is None or 0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "in (0, 1]")
        if self.thaw_at is not None:
            to_iterations(self.thaw_at, 1, 1, "thaw_at")
            require(len(self.freeze) > 0, "thaw_at", self.thaw_at, "null: freeze names nothing that could thaw")


@dataclass(frozen=True)
class Tiles:
    """How large pictures are looked at: see inference/tiles.py."""

    size: int | None = None  # pixels of the picture, as they are in its file; null or 0: pictures are seen whole
    overlap: float = 0.2  # share of a tile's side that neighbours have in common, at least
    whole: bool = True  # and once more as a whole, made as small as a tile

    def __post_init__(self):
        wanted = "at least 32, or null: no tiles"
        require(not self.size or self.size >= 32, "tiles.size", self.size, wanted)
        require(0 <= self.overlap <= 0.9, "tiles.overlap", self.overlap, "a share from 0 to 0.9")


@dataclass(frozen=True)
class Evaluation:
    """When the model is evaluated during training, and what the best checkpoint is best at."""

    every: Length | None = None  # null: only at the end
    metric: str = "auto"  # like bbox.AP or segm.AP50; auto: segm.AP if the model predicts masks, else bbox.AP
    evaluator: Literal["hotcoco", "pycocotools"] = "hotcoco"
    batch_size: int = 8  # over all ranks
    sigmas: list[float] | None = None  # fall-off of each keypoint; null: COCO's for 17, else their mean
    # of a class in an image: AP takes the last, and the box head keeps as many; keypoints have COCO's 20 with COCO's
    # list
    max_detections: list[int] = field(default_factory=lambda: list(COCO_LIMITS))
    tiles: Tiles = field(default_factory=Tiles)
    froc: bool = False  # sensitivity at 1/8 to 8 false detections an image too
    losses: bool = False  # the terms of the training's loss on the validation set too

    def __post_init__(self):
        if isinstance(self.tiles, Mapping):
            object.__setattr__(self, "tiles", Tiles(**self.tiles))
        require(not (self.losses and self.tiles.size), "losses", self.losses, "false with tiles, which have no truth")
        if self.every is not None:
            to_iterations(self.every, 1, 1, "every")
        known = re.fullmatch(r"auto|(bbox|segm|keypoints)\.A[PR]\w*|attributes\.(AP|accuracy)", self.metric)
        require(known is not None, "metric", self.metric, "auto, or like bbox.AP, segm.AP50, bbox.APs")
        check_limits(self.max_detections)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
