"""The files of a run: checkpoints under their names, which of them a resumed run takes, and the lock of its folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from detector.checkpoint import CheckpointError, atomically, flatten, load, save
from detector.config import ConfigError, RunError, make_folder
from detector.runtime import World
from detector.settings import UNLEARNT

# a run that differs from its checkpoint in one of these is another run; in the others it may go on differently
IDENTITY = ("seed", "model", "roi", "data", "augment", "optimizer", "training")
IRRELEVANT = (*UNLEARNT, "weights")  # what the weights were before is past
# the same data may lie elsewhere, what stopped a run may be left out, and more detections may be measured
MOVABLE = tuple(f"data.{key}" for key in ("root", "train.images", "val.images", "on_error", "max_pixels"))
MOVABLE += ("training.patience", "model.box_head.detections_per_image")
GROWING = ("model", "data", "training")  # where new versions add keys
BEFORE = {"interpolation": 1}  # what was done where nothing was said: bilinear, also where pictures shrink
log = logging.getLogger(__name__)


def publish(state: Mapping[str, Any], folder: Path, numbered: bool, best: bool, keep: int) -> None:
    """Write last.pt, and give the same file the names best.pt and iteration_NNNNNN.pt where asked; keep the newest
    `keep` numbered ones."""
    last = folder / "last.pt"
    save(state, last)
    if best:
        duplicate(last, folder / "best.pt")
    if numbered and keep:
        duplicate(last, folder / f"iteration_{state['iteration']:07d}.pt")
        for old in sorted(folder.glob("iteration_*.pt"))[:-keep]:
            old.unlink()


def duplicate(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where the file system has no links."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with open(source, "rb") as file:
            atomically(target, lambda copy: shutil.copyfileobj(file, copy))
        return
    os.replace(temporary, target)


def find(resume: str, folder: Path) -> dict[str, Any] | None:
    """The state that `resume` = auto, none or a path asks for; None for a fresh start.

    auto takes the newest checkpoint of the folder that can be read, with a warning for each that cannot.
    Raises CheckpointError if there are some but none is readable.
    """
    if resume == "none":
        return None
    if resume != "auto":
        return load(resume)
    names = ["last.pt", *sorted((p.name for p in folder.glob("iteration_*.pt")), reverse=True), "best.pt"]
    paths = [folder / name for name in names if (folder / name).exists()]
    for path in paths:
        try:
            state = load(path)
        except CheckpointError as error:
            log.warning("%s", error)
            continue
        if path != paths[0]:
            log.warning("continuing from %s, iteration %d, instead", path, state["iteration"])
        return state
    if paths:
        raise CheckpointError(f"{folder}: none of its {len(paths)} checkpoints can be read; resume=none starts anew")
    return None


def compare_configs(stored: Mapping[str, Any], current: Mapping[str, Any], chosen: Collection[str] = ()) -> None:
    """Refuse to continue a run as another one.

    Raises ConfigError naming the keys if the two differ in what the weights, the data or the steps depend on; warns if
    they differ elsewhere, as in a longer schedule, or in keys that did not exist when the checkpoint was written.
    chosen: keys that the command line sets; these are never taken for such new ones.
    """
    old, new = flatten(stored), flatten(current)
    old = {key: BEFORE[key.rpartition(".")[2]] for key in new if said_later(key, old, new)} | old
    differing = [key for key in sorted({*old, *new}) if old.get(key, "absent") != new.get(key, "absent")]
    differing = [key for key in differing if not {key, key.split(".")[0]} & {*IRRELEVANT}]
    lines = {key: f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in differing}
    since = {key for key in differing if key.split(".")[0] in GROWING and is_new(key, stored) and key not in chosen}
    serious = [lines[k] for k in differing if k.split(".")[0] in IDENTITY and k not in MOVABLE and k not in since]
    if serious:
        raise ConfigError(
            f"the checkpoint is of a run with another configuration ({'; '.join(serious[:8])}). Give the same "
            "settings, another run_dir, or resume=none to overwrite"
        )
    for key in differing:
        log.warning("continuing with another setting than before: %s", lines[key])


def said_later(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether `key` of augment is one that older versions did not have, of a step that the stored config has, too."""
    node, _, name = key.rpartition(".")
    step = f"{node}._target_"
    return name in BEFORE and node.startswith("augment") and key not in old and old.get(step) == new.get(step)


def is_new(key: str, stored: Any) -> bool:
    """Whether `key` is all that the stored config lacks: the node that it belongs to is there."""
    *parents, _ = key.split(".")
    for part in parents:
        stored = stored.get(part) if isinstance(stored, Mapping) else None
    return isinstance(stored, Mapping) and key.rpartition(".")[2] not in stored


@contextlib.contextmanager
def unless_begun(folder: Path, world: World) -> Iterator[None]:
    """Where a run fails before its first checkpoint, its folder is left as no run: without config.yaml, which `compare`
    and others know runs by, and without what was begun to be recorded. train.log stays: it says what failed."""
    try:
        yield
    except Exception:
        if world.main and not any(folder.glob("*.pt")):
            for name in ("config.yaml", "log.jsonl"):
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run directory for this process; the lock vanishes with the process, however it ends.

    Raises RunError naming the holder if another living process has it, ConfigError if nothing can be written there.
    """
    make_folder(folder, "run_dir")
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunError(f"{folder} is in use by {holder}; choose another run_dir, or end that one first") from error
        os.register_at_fork(after_in_child=file.close)  # or a worker keeps it longer than this process
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        for stale in folder.glob(".*.tmp"):  # of a process that was killed while writing
            stale.unlink()
        yield
