"""What can go wrong in the middle of a run, and what is kept then."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from detector.checkpoint import atomically
from detector.config import RunError
from detector.engine.state import Run, State
from detector.runtime import World, free_memory
from detector.settings import Training
from detector.structures import Batch, Targets

log = logging.getLogger(__name__)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # disks that cannot be written to
AGAIN = "the last checkpoint is intact, and the same command goes on from there"


@contextlib.contextmanager
def explain_errors(folder: Path, world: World, training: Training) -> Iterator[None]:
    """A full disk, full memory, a killed worker and a lost rank become a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise RunError(
            f"{folder} cannot be written to ({error.strerror}); {free:.0f} MiB are free there. Make room: {AGAIN}"
        ) from error
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in reason:
            raise RunError(
                f"rank {world.rank}: {out_of_memory(reason, world, training)}. {AGAIN.capitalize()}"
            ) from error
        if reason.startswith("DataLoader worker"):
            raise RunError(
                f"rank {world.rank}: a data-loading process has died, most often for want of memory ({reason}). Set "
                f"runtime.workers or training.batch_size lower: {AGAIN}"
            ) from error
        if isinstance(error, dist.DistError) or "gloo" in reason:
            raise RunError(
                f"rank {world.rank}: another rank has ended or cannot be reached; what it says itself, or the system's "
                f"log, tells why ({reason}). {AGAIN.capitalize()}; torchrun --max-restarts=3 does so by itself"
            ) from error
        raise


def out_of_memory(reason: str, world: World, training: Training) -> str:
    """How much memory there is, and what to lower, the cheapest first."""
    if world.device.type == "cuda":
        where = f"the memory of {torch.cuda.get_device_name(world.device)}"
    else:
        where = "this machine's memory"
    free, total = free_memory(world.device)
    each = training.batch_size // training.accumulate // world.size
    share = training.batch_size // world.size
    parts = next(
        (n for n in range(training.accumulate + 1, share + 1) if training.batch_size % n == 0 == share % n), None
    )
    ways = [f"training.accumulate={parts} (the same step in more parts)"] if parts else []
    ways += ["runtime.precision=bf16", "a smaller training.batch_size", "smaller pictures (augment)"]
    return (
        f"{where} is full with {each} images at once ({free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; "
        f"{reason}). Set, the first first: {', '.join(ways)}"
    )


def on_main(world: World, work: Callable[[], Any]) -> None:
    """Do `work` on rank 0; if it fails there, all ranks fail with it instead of waiting for ever."""
    error = None
    if world.main:
        try:
            work()
        except Exception as problem:
            error = problem
    error = world.from_main(error)
    if error is not None:
        raise error


def nonfinite(
    run: Run,
    state: State,
    losses: Mapping[str, Tensor],
    norm: Tensor,
    micro_batches: Sequence[tuple[Batch, Targets]],
    save: Callable[[], None],
) -> None:
    """A step gave NaN or infinity on some rank: say where, keep its batch, and skip the step or stop.

    Called on all ranks, before the weights are touched: what was learned is saved before a stop. Raises RunError unless
    the step may be skipped.
    """
    step, runtime, world = state.iteration + 1, run.runtime, run.world
    bad = [f"{name} = {value.item()}" for name, value in losses.items() if not value.isfinite()]
    if bad or not norm.isfinite():
        what = ", ".join(bad) if bad else f"the gradient's norm = {norm.item()}, with finite losses"
        images = [image for batch, _ in micro_batches for image in batch.image_ids.tolist()]
        names = ", ".join(f"{image} ({file_name(run.train_set, image)})" for image in images)
        path = run.folder / f"nonfinite_{step:07d}_rank{world.rank}.pt"
        content = {
            "losses": {name: value.item() for name, value in losses.items()},
            "batches": [{"batch": cpu(batch), "targets": cpu(targets)} for batch, targets in micro_batches],
        }
        atomically(path, lambda file: torch.save(content, file))
        log.error("step %d is not finite: %s; images %s; the batch is in %s", step, what, names, path)
    weights = [name for name, value in state.model.state_dict().items() if not value.float().isfinite().all()]
    if world.any(bool(weights))[0]:
        raise RunError(f"step {step}: weights are not finite: {', '.join(weights[:5])}; go back to a checkpoint before")
    if runtime.on_nonfinite == "stop":
        save()
        raise RunError(
            f"stopped before step {step}, which is not finite (see above). Lower optimizer.lr, set training.clip_norm, "
            "look at the saved batch, or set runtime.on_nonfinite=skip; the same command then continues"
        )
    if state.nonfinite >= runtime.max_nonfinite:
        save()
        raise RunError(
            f"stopped before step {step}, which is not finite: runtime.max_nonfinite = {runtime.max_nonfinite} steps "
            "were skipped already"
        )
    state.nonfinite += 1
    log.warning("step %d is skipped, %d of at most %d", step, state.nonfinite, runtime.max_nonfinite)


def cpu(part: Batch | Targets) -> dict[str, Tensor | None]:
    return {name: value if value is None else value.cpu() for name, value in part._asdict().items()}


def file_name(dataset: Any, image_id: int) -> str:
    """The file of an image, for messages."""
    return dataset.annotations.file_name(int((dataset.annotations.image_ids == image_id).argmax()))
