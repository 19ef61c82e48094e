"""Annotations kept as arrays on disk: parsed once, then mapped into memory by every process that needs them.

A store is a folder with one .npy file for each array of `Annotations`, and one below truth/ for each of their `truth`,
named after the content of the JSON file and the options it was read with. It is written elsewhere and moved to its
place in one step: it is whole or not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from glob import escape
from pathlib import Path

import numpy as np

from detector.data.annotations import Annotations, Truth
from detector.data.attributes import Groups
from detector.data.read_coco import Places, Problems
from detector.data.several import Paths, as_paths, read_several, shown

logger = logging.getLogger(__name__)

VERSION = 6  # of what a store holds; older ones are not read
OPTIONS = "options.json"  # of a store with the truth: those of OF_TRUTH that it was read with
OF_TRUTH = ("masks", "max_pixels", "keypoints")
SMALL = 20_000_000  # bytes of JSON that are parsed faster than it is worth storing


def open_coco(
    paths: Paths,
    categories: Sequence[str] | None = None,
    masks: bool = True,
    on_error: str = "raise",
    max_pixels: int = 100_000_000,
    keypoints: bool = False,
    attributes: bool | Sequence[str] | Groups = False,
    cache: str | os.PathLike | None = None,
    small: int = SMALL,
    truth: bool = True,
    problems: Problems | None = None,
) -> Annotations:
    """`read_coco` of a file, or of several joined (see several.py), whose result is kept in the folder `cache` for the
    next time, under a name made of the content of all.

    Files below `small` bytes together are always parsed, and so is everything where `cache` is None or cannot be
    written. What is wrong in a file is reported each time it is opened, or added to `problems`.
    """
    paths = as_paths(paths)
    options = {"categories": categories and list(categories), "masks": masks, "max_pixels": max_pixels}
    options |= {"keypoints": keypoints, "truth": truth, "attributes": attributes}
    collected, problems = problems, problems or Problems(shown(paths), on_error)
    if (folder := cache_of(paths, cache, small)) is None:
        try:
            found = read_several(paths, on_error=on_error, problems=problems, **options)
        finally:  # what is wrong with the records is said first
            if collected is None:
                problems.report()
        return found
    options_key = hashlib.sha256(json.dumps([VERSION, options]).encode()).hexdigest()[:8]
    place = folder / f"{paths[0].stem}-{contents_key(paths, folder)}-{options_key}"
    if not place.is_dir():
        found = read_several(paths, problems=problems, **options)
        if collected is None:
            problems.report()
        try:
            save(found, problems, place, {name: options[name] for name in OF_TRUTH})
        except OSError as error:
            logger.warning(
                "%s cannot be stored in %s and will be parsed again next time: %s", shown(paths), place, error
            )
            return found
        return load(place)[0]
    found = _known(place, problems)
    if collected is None:
        problems.report()
    return found


def _known(place: Path, problems: Problems) -> Annotations:
    """The annotations of a store; what is wrong in their file is added to `problems`."""
    try:
        found, known = load(place)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"stored annotations {place} are damaged ({error}): remove this folder") from error
    problems.found |= known
    return found


def open_truth(
    paths: Paths,
    *,
    masks: bool = True,
    on_error: str = "raise",
    max_pixels: int = 100_000_000,
    keypoints: bool = False,
    cache: str | os.PathLike | None = None,
    small: int = SMALL,
) -> Truth:
    """What evaluation compares with in these files, from the store that any program left of them: which categories and
    attributes it wanted is nothing to the truth. Without one it is that of `open_coco`, which leaves one.

    Raises ValueError where the store is damaged, and what `open_coco` raises.
    """
    paths = as_paths(paths)
    options = {"masks": masks, "max_pixels": max_pixels, "keypoints": keypoints}
    folder = cache_of(paths, cache, small)
    place = next(_stores(paths, folder, options), None) if folder and folder.is_dir() else None
    if place is None:
        return open_coco(paths, on_error=on_error, cache=cache, small=small, **options).truth
    problems = Problems(shown(paths), on_error)
    found = _known(place, problems).truth
    problems.report()
    return found


def _stores(paths: Sequence[Path], folder: Path, options: Mapping) -> Iterator[Path]:
    """The stores of these files whose truth was read with these options."""
    for place in sorted(folder.glob(f"{escape(paths[0].stem)}-{contents_key(paths, folder)}-*")):
        known = None
        with contextlib.suppress(OSError, ValueError):  # one of before, or without a truth, has no such file
            known = json.loads((place / OPTIONS).read_text(encoding="utf-8"))
        if known == options:
            yield place


def cache_of(paths: Sequence[Path], cache: str | os.PathLike | None, small: int = SMALL) -> Path | None:
    """The folder that keeps what is made of these files; None where that is not worth it, or nothing to be made."""
    if not cache or not all(path.is_file() for path in paths) or sum(path.stat().st_size for path in paths) < small:
        return None
    return Path(cache).expanduser()


def contents_key(paths: Sequence[Path], cache: Path | None = None) -> str:
    """`content_key` of one file, and a name of as many letters for the content of several, in their order."""
    keys = [content_key(path, cache) for path in paths]
    return keys[0] if len(keys) == 1 else hashlib.sha256("".join(keys).encode()).hexdigest()[:24]


def content_key(path: Path, cache: Path | None = None) -> str:
    """A name for the content of the file. With a `cache` it is read again only where size or time of change differ from
    last time."""
    if cache is None:
        return _digest(path)
    status = path.stat()
    known = [status.st_size, status.st_mtime_ns]
    note = cache / f".key-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    with contextlib.suppress(OSError, ValueError):
        *seen, name = json.loads(note.read_text(encoding="utf-8"))
        if seen == known:
            return name
    name = _digest(path)
    if time.time_ns() - status.st_mtime_ns > 2_000_000_000:  # a change within the clock's tick would not be seen
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
            draft = note.with_name(f"{note.name}-{os.getpid()}")
            draft.write_text(json.dumps([*known, name]), encoding="utf-8")
            draft.replace(note)
    return name


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:24]


def save(found: Annotations, problems: Problems, place: Path, options: dict) -> None:
    """Write a store, with the `options` that its truth depends on. Several processes may do so at once: the first to
    finish wins."""
    with in_one_step(place) as draft:
        about = {"problems": [[*kind, p.count, p.examples] for kind, p in problems.found.items()]}
        _save_json(about | _save_arrays(found, draft), draft)
        if found.truth is not None:
            (draft / "truth").mkdir()
            (draft / OPTIONS).write_text(json.dumps(options), encoding="utf-8")
            _save_json(_save_arrays(found.truth, draft / "truth"), draft / "truth")


@contextlib.contextmanager
def in_one_step(place: Path) -> Iterator[Path]:
    """A folder to write to, which then becomes `place`, unless another process was faster. Raises OSError."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=place.parent))
    try:
        yield draft
        draft.chmod(0o755)
        draft.rename(place)
    except OSError:
        if not place.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _save_arrays(found: Annotations | Truth, folder: Path) -> dict:
    """Save the arrays; returns the other fields, but for `truth`."""
    values = {item.name: getattr(found, item.name) for item in dataclasses.fields(found) if item.name != "truth"}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            np.save(folder / f"{name}.npy", value)
    return {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}


def _save_json(about: dict, folder: Path) -> None:
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def load(place: Path) -> tuple[Annotations, dict]:
    """The annotations of a store, mapped, and `Problems.found` of the file they came from."""
    about, arrays = _load_arrays(place)
    problems = {(is_error, kind): Places(*places) for is_error, kind, *places in about.pop("problems")}
    truth = None
    if (place / "truth").is_dir():
        truth_about, truth_arrays = _load_arrays(place / "truth")
        truth = Truth(**truth_about, **truth_arrays)
    return Stored(**about, **arrays, truth=truth, place=place), problems


def _load_arrays(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    arrays = {item.stem: np.asarray(np.load(item, mmap_mode="r")) for item in folder.glob("*.npy")}
    return json.loads((folder / "about.json").read_text(encoding="utf-8")), arrays


@dataclasses.dataclass(frozen=True)
class Stored(Annotations):
    """Annotations in a store; another process gets the store's name, not its content."""

    place: Path = dataclasses.field(kw_only=True)

    def __reduce__(self):
        return _reopen, (self.place,)


def _reopen(place: Path) -> Annotations:
    return load(place)[0]
