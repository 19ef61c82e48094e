"""From a configuration to batches: the data set, the order of its samples, and the loader."""

from __future__ import annotations

import gc
import itertools
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from hydra.utils import instantiate
from torch.utils.data import DataLoader, Sampler

from detector.config import ConfigError, RunError
from detector.data.attributes import Groups
from detector.data.dataset import CocoDataset, collate
from detector.data.pictures import Pictures
from detector.data.places import Folder, as_places
from detector.data.read_coco import Problems
from detector.data.sampling import draw_epoch, image_weights
from detector.structures import Batch, Targets

COPY = 1 << 32  # added to the epoch of a sample for each time that its image was drawn before in the epoch


def build_dataset(
    data: Mapping[str, Any],
    split: str,
    augment: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    categories: Sequence[str] | None = None,
    problems: Problems | None = None,
    truth: bool | None = None,
    attributes: Groups | None = None,
) -> CocoDataset:
    """The data set of one split.

    Args:
        data: configs/data/*.yaml.
        split: "train" or "val".
        augment: configs/augment/*.yaml; its list of the same name is the split's pipeline. None: no transforms.
        seed: of everything random.
        categories: names of labels 1, 2, ...: the training set's when the validation set is built, the checkpoint's in
            evaluation.
        problems: collects what is wrong in the files, instead of `data.on_error`.
        truth: keep what evaluation compares with; by default for "val".
        attributes: the groups of the training set or the checkpoint, in place of all that `data.attributes` wants.
    """
    return CocoDataset(
        *split_files(data, split),
        build_transforms(augment, split),
        categories=categories,
        masks=data["masks"],
        mask_size=data["mask_size"],
        keep_empty=data["keep_empty"] or split != "train",
        seed=seed,
        on_error=data["on_error"],
        training=split == "train",
        pictures=Pictures.of(data),
        keypoints=data.get("keypoints", False),
        cache=data.get("cache"),
        copy_paste=augment.get("copy_paste", 0.0) if augment and split == "train" else 0.0,
        problems=problems,
        truth=split != "train" if truth is None else truth,
        attributes=(attributes or data["attributes"]) if data.get("attributes") else False,
        setting=(f"data.{split}.images", data["root"]),
    )


def split_files(data: Mapping[str, Any], split: str) -> tuple[list[Folder], list[Path]]:
    """The image folders, shards or addresses and the annotation files of a split. Raises ConfigError for what
    pictures are not read from, naming the key."""
    root, annotations = Path(data["root"]), data[split]["annotations"]
    try:
        images = as_places(data[split]["images"], root, data.get("cache"))
    except ValueError as error:
        raise ConfigError(f"data.{split}.images={error}") from None
    return [*images], [root / path for path in ([annotations] if isinstance(annotations, str) else annotations)]


def build_transforms(augment: Mapping[str, Any] | None, split: str) -> list:
    """The transforms of configs/augment/*.yaml for "train" or "val"."""
    return [] if augment is None else [instantiate(step, _convert_="all") for step in augment[split] or []]


class TrainingSampler(Sampler[list[tuple[int, int]]]):
    """Endless batches of (epoch, index): every epoch is a new permutation, batches run on across epochs.

    The order is a function of (seed, position) alone: the global batches are the same for every world size, and rank r
    takes the r-th of `world` equal consecutive parts of each. Nothing is dropped.

    Args:
        weights: [I] how often images are drawn, in proportion, or None: each once in an epoch. A sample
            whose image comes again in an epoch has epoch + 2^32 for each time before, and so its own augmentation.
        aspect_ratios: [I] width / height of the images, or None. Where given, a batch holds only landscape or only
            portrait images, which saves padding.
        batch_size: of all ranks together.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        aspect_ratios: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ):
        if length < 1:
            raise ValueError(f"length={length}: the data set is empty")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size={batch_size} (of all ranks together) must be a multiple of world={world}")
        if not 0 <= rank < world:
            raise ValueError(f"rank={rank}: must be in 0..{world - 1}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.part = slice(batch_size // world * rank, batch_size // world * (rank + 1))
        self.groups = np.zeros(length, bool) if aspect_ratios is None else np.asarray(aspect_ratios) < 1
        self.weights = weights
        self.position = 0  # samples that have been used: where the next iteration starts

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position, "epoch": self.position // self.length}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state["position"] % self.batch_size:
            raise ValueError(
                f"cannot resume at sample {state['position']}: it is no multiple of batch_size={self.batch_size}; "
                "keep the global batch of the run that is resumed"
            )
        self.position = state["position"]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in itertools.chain.from_iterable(self._epochs()):
            yield [tuple(sample) for sample in batch[self.part].tolist()]

    def _epochs(self) -> Iterator[np.ndarray]:
        """Batches [B, batch_size, 2] that are complete within each epoch, from the position on."""
        skip = self.position // self.batch_size
        waiting = [np.zeros((0, 2), np.int64)] * 2  # per group: samples for which no batch was left
        for epoch in itertools.count():
            rng = np.random.default_rng((self.seed, epoch))
            if self.weights is None:
                order, copies = rng.permutation(self.length), 0
            else:
                order, copies = draw_epoch(self.weights, rng)
            samples = np.stack([np.full(self.length, epoch) + copies * COPY, order], axis=1)
            batches, completed = [], []
            for group in range(2):
                own = np.flatnonzero(self.groups[order] == group)
                queue = np.concatenate([waiting[group], samples[own]])
                when = np.concatenate([np.full(len(waiting[group]), -1), own])
                full = len(queue) // self.batch_size * self.batch_size
                batches.append(queue[:full].reshape(-1, self.batch_size, 2))
                completed.append(when[:full][self.batch_size - 1 :: self.batch_size])
                waiting[group] = queue[full:]
            turn = np.argsort(np.concatenate(completed))
            yield np.concatenate(batches)[turn][skip:]
            skip = max(0, skip - len(turn))


class EvaluationSampler(Sampler[list[int]]):
    """Every sample once. The batches are the same for every world size; rank r takes every world-th of them.

    Images of like aspect ratio come together where `aspect_ratios` are given: of one size after the usual resizing, the
    model takes them in one pass.
    """

    def __init__(
        self, length: int, batch_size: int, *, rank: int = 0, world: int = 1, aspect_ratios: np.ndarray | None = None
    ):
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"batch_size={batch_size} must be positive and rank={rank} in 0..{world - 1}")
        self.order = np.arange(length) if aspect_ratios is None else np.argsort(aspect_ratios, kind="stable")
        self.batch_size = batch_size
        self.starts = range(0, length, batch_size)[rank::world]

    def __iter__(self) -> Iterator[list[int]]:
        return (self.order[start : start + self.batch_size].tolist() for start in self.starts)

    def __len__(self) -> int:
        return len(self.starts)


class Loader:
    """Batches on the host, made by worker processes that live as long as the loader.

    `sampler.position` counts the samples handed out, not those prepared ahead: `state_dict()` is what a checkpoint
    needs.
    """

    def __init__(self, dataset: CocoDataset, sampler: Sampler, workers: int, collate_fn, pin_memory: bool):
        self.dataset, self.sampler = dataset, sampler
        self._loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            worker_init_fn=_init_worker,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # the loader draws a seed for its workers; leave the global state alone
        )

    def __iter__(self) -> Iterator[tuple[Batch, Targets]]:
        try:
            for item in self._loader:
                if isinstance(self.sampler, TrainingSampler):
                    self.sampler.position += self.sampler.batch_size
                yield item
        except (EOFError, OSError) as error:
            if ended := ended_workers(self._loader):
                raise RuntimeError(f"DataLoader worker (pid(s) {ended}) exited unexpectedly") from error
            raise

    def __len__(self) -> int:
        """Batches of an evaluation; training has no end."""
        return len(self.sampler)

    def close(self) -> None:
        """End the worker processes now, without signals."""
        end_workers(self._loader)

    def state_dict(self) -> dict[str, int]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.sampler.load_state_dict(state)


def ended_workers(loader: DataLoader) -> str:
    """The numbers of a loader's worker processes that have ended, or do within a second: a dying one's pipes close
    before it is seen to have ended, when torch asks once."""
    workers = getattr(loader._iterator, "_workers", [])  # none where this process loads, or none could be started
    ended = multiprocessing.connection.wait([worker.sentinel for worker in workers], timeout=1) if workers else []
    return ", ".join(str(worker.pid) for worker in workers if worker.sentinel in ended)


def end_workers(loader: DataLoader) -> None:
    """End a loader's persistent worker processes now; the next iteration starts others. torch has no public way."""
    iterator, loader._iterator = loader._iterator, None
    if iterator is not None:
        iterator._shutdown_workers()


def build_loader(
    dataset: CocoDataset,
    batch_size: int,
    workers: int = 2,
    *,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
    start_position: int = 0,
    training: bool = True,
    group_by_aspect: bool = True,
    pad_multiple: int = 32,
    pad_to: Sequence[int] | None = None,
    pin_memory: bool | None = None,
    sampling: str = "uniform",
    repeat_threshold: float = 0.001,
) -> Loader:
    """Batches for training (endless, shuffled) or evaluation (each image once).

    Args:
        batch_size: training: of all ranks together. Evaluation: of each rank.
        workers: processes per rank; 0 loads in this process.
        start_position: training: samples that an earlier run has used.
        group_by_aspect: separate batches for landscape and portrait images.
        pad_multiple, pad_to: see `collate`.
        pin_memory: by default where CUDA is available.
        sampling, repeat_threshold: training: how often images are drawn, see `sampling.image_weights`.
    """
    ratios = dataset.image_sizes[:, 1] / dataset.image_sizes[:, 0] if group_by_aspect else None
    where = {"rank": rank, "world": world, "aspect_ratios": ratios}
    if training:
        weights = image_weights(dataset.annotations, dataset.rows, sampling, repeat_threshold)
        sampler = TrainingSampler(len(dataset), batch_size, seed=seed, weights=weights, **where)
        sampler.load_state_dict({"position": start_position})
    else:
        sampler = EvaluationSampler(len(dataset), batch_size, **where)
    collate_fn = partial(collate, multiple=pad_multiple, size=None if pad_to is None else tuple(pad_to))
    return Loader(
        dataset, sampler, workers, collate_fn, torch.cuda.is_available() if pin_memory is None else pin_memory
    )


def _init_worker(worker: int) -> None:
    # schedulers and terminals signal the whole group: the main process decides, it has half a minute for its step
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
    gc.freeze()  # the collector would touch, and so copy, the memory that is shared with the parent
    cv2.setNumThreads(0)  # the processes are the parallelism
    torch.set_num_threads(1)


def readable(batches: Iterable, last: Path, save: Callable[[], None] | None = None) -> Iterator:
    """The batches; an image that cannot be read becomes a RunError, with the ways on from the checkpoint `last`, which
    `save` then writes, if it is given."""
    try:
        yield from batches
    except (ValueError, OSError) as error:
        if save is not None:
            save()
        reason = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")  # a worker sends its traceback too
        ways = f"Mend it and go on with resume={last}, or go on without what cannot be read: data.on_error=skip"
        raise RunError(f"{reason}. {ways}") from error
