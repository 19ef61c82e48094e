"""What a data set holds, in a few bytes that a checkpoint keeps, so that a change between two starts is noticed.

That is the key of the annotation file's bytes, the size of every image file, and a checksum of parts of up to SUMMED of
them, for formats in which another picture has the same size. Where the data lie, and when files were changed, does not
matter: copies are the same.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detector.data.dataset import CocoDataset
from detector.data.file_names import leads_out
from detector.data.places import Folder, is_address
from detector.data.several import shown
from detector.data.store import cache_of, contents_key
from detector.ops.text import one_line

GONE, UNKNOWN = -1, -2  # in the place of a size; nobody asks a server for each of its files
MANY = 1000  # files that one thread looks at: network storage answers slowly, but many questions at once
NAMED = 3  # files that a message names
SUMMED = 10_000  # files, spread evenly over the data set, that are read in part
PART = 16 * 1024  # bytes at the start, in the middle and at the end of a file: 10,000 files of any size in some seconds


def contents(dataset: CocoDataset) -> dict[str, Any]:
    """{"annotations": key of the files' content, "sizes": [I] int64, bytes of each image file that it names, or GONE or
    UNKNOWN, "sums": [I] int64, checksum of each file that is read for it, or -1}. Behind an address none is read."""
    names, sources = dataset.file_names(), dataset.annotations.sources
    rows, step = range(len(names)), max(1, -(-len(names) // SUMMED))

    def look(start: int) -> torch.Tensor:
        own = rows[start : start + MANY]
        found = [_look(dataset.folders[sources[i]], names[i], i % step == 0) for i in own]
        return torch.tensor(found, dtype=torch.int64).reshape(-1, 2)

    with ThreadPoolExecutor() as pool:
        looks = torch.cat(list(pool.map(look, range(0, len(names), MANY))))
    key = contents_key(dataset.annotation_files, cache_of(dataset.annotation_files, dataset.cache))
    return {"annotations": key, "sizes": looks[:, 0].clone(), "sums": looks[:, 1].clone()}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one["annotations"] == other["annotations"] and not _differing(one, other).any()


def short_key(held: Mapping[str, Any]) -> str:
    """Eight hex digits of all that a data set holds: for names and notes."""
    images = b"".join(held[key].numpy().tobytes() for key in ("sizes", "sums"))
    return hashlib.sha256(held["annotations"].encode() + images).hexdigest()[:8]


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> np.ndarray:
    """Which image files are not the same in both, [I]; checkpoints of before had no sums."""
    sizes, sums = ([held[key].numpy() for held in (one, other) if key in held] for key in ("sizes", "sums"))
    if len(sizes[0]) != len(sizes[1]):
        return np.ones(1, bool)
    both = (sizes[0] != UNKNOWN) & (sizes[1] != UNKNOWN)
    summed = (sums[0] >= 0) & (sums[-1] >= 0) if len(sums) == 2 else False
    return (both & (sizes[0] != sizes[1])) | (summed & (sums[0] != sums[-1]))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], dataset: CocoDataset, split: str) -> list[str]:
    """What is no longer as it was, each with its key and files; nothing about images under other annotations."""
    if before["annotations"] != now["annotations"]:
        return [f"data.{split}.annotations: the content of {dataset.origin}"]
    rows = np.flatnonzero(_differing(before, now))
    if not len(rows):
        return []
    names, old, new = dataset.file_names(), before["sizes"].numpy(), now["sizes"].numpy()
    folders = [dataset.folders[source] for source in dataset.annotations.sources[rows[:NAMED]]]
    named = [_difference(dataset, folder, names[row], old[row], new[row]) for folder, row in zip(folders, rows[:NAMED])]
    named += ["..."] if len(rows) > NAMED else []
    where = shown(dataset.folders)
    return [f"data.{split}.images: {len(rows)} of {len(old)} files in {where} ({'; '.join(named)})"]


def _difference(dataset: CocoDataset, folder: Folder, name: str, old: int, new: int) -> str:
    """Whether the file is damaged, or its sizes then and now."""
    if new != GONE:
        try:
            dataset.pictures.read(folder / name)
        except (OSError, ValueError) as error:
            return one_line(str(error))
    if old == new:
        return one_line(f"{name}: another content")
    then, now = ("not there" if size == GONE else f"{size} bytes" for size in (old, new))
    return one_line(f"{name}: {then}, now {now}")


def _look(folder: Folder, name: str, read: bool) -> tuple[int, int]:
    """The bytes of a file, and, if it is to be `read`, the checksum of its parts; GONE for what cannot be had."""
    try:
        file = folder / name
        if isinstance(file, Path):
            size = GONE if leads_out(name) else file.stat().st_size
        else:
            size, read = file.size(), read and not is_address(str(folder))
        if not read or size in (GONE, None):
            return UNKNOWN if size is None else size, GONE
        total = 0
        with file.open("rb") as file:
            for start in sorted({0, max(0, size // 2 - PART // 2), max(0, size - PART)}):
                file.seek(start)
                total = zlib.crc32(file.read(PART), total)
        return size, total
    except OSError:
        return GONE, GONE
