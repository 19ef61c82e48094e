"""What a data set holds, in a few bytes that a checkpoint keeps, so that a change between two starts is noticed.

That is the key of the annotation file's bytes, and the size of every image file: all that can be had without reading
the images. Where the data lie, and when files were changed, does not matter: copies are the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detector.data.dataset import CocoDataset, read_image
from detector.data.file_names import leads_out
from detector.data.store import SMALL, content_key
from detector.ops.text import one_line

GONE = -1
MANY = 1000  # files that one thread looks at: network storage answers slowly, but many questions at once
NAMED = 3  # files that a message names


def contents(dataset: CocoDataset) -> dict[str, Any]:
    """{"annotations": key of the file's content, "sizes": [I] int64, bytes of each image file that it names, or -1}."""
    names = dataset.file_names()
    with ThreadPoolExecutor() as pool:
        parts = pool.map(
            lambda start: [_size(dataset.folder, name) for name in names[start : start + MANY]],
            range(0, len(names), MANY),
        )
        sizes = torch.tensor([size for part in parts for size in part], dtype=torch.int64)
    is_large = dataset.annotation_file.stat().st_size >= SMALL
    key = content_key(dataset.annotation_file, Path(dataset.cache).expanduser() if dataset.cache and is_large else None)
    return {"annotations": key, "sizes": sizes}


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one["annotations"] == other["annotations"] and torch.equal(one["sizes"], other["sizes"])


def changes(before: Mapping[str, Any], now: Mapping[str, Any], dataset: CocoDataset, split: str) -> list[str]:
    """What is no longer as it was, each with its key and files; nothing about images under other annotations."""
    if before["annotations"] != now["annotations"]:
        return [f"data.{split}.annotations: the content of {dataset.annotation_file}"]
    old, new = before["sizes"].numpy(), now["sizes"].numpy()
    rows = np.flatnonzero(old != new)
    if not len(rows):
        return []
    names = dataset.file_names()
    shown = [_difference(dataset, names[row], old[row], new[row]) for row in rows[:NAMED]]
    more = ["..."] if len(rows) > NAMED else []
    return [f"data.{split}.images: {len(rows)} of {len(old)} files in {dataset.folder} ({'; '.join(shown + more)})"]


def _difference(dataset: CocoDataset, name: str, old: int, new: int) -> str:
    """Whether the file is damaged, or its sizes then and now."""
    if new != GONE:
        try:
            read_image(dataset.folder / name, dataset.max_pixels)
        except (OSError, ValueError) as error:
            return one_line(str(error))
    then, now = ("not there" if size == GONE else f"{size} bytes" for size in (old, new))
    return one_line(f"{name}: {then}, now {now}")


def _size(folder: Path, name: str) -> int:
    try:
        return GONE if leads_out(name) else os.stat(folder / name).st_size
    except OSError:
        return GONE
