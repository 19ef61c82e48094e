"""The fields of many records as arrays that grow by blocks, in 1 to 2 times the memory of the result.

A block is a dict of columns that have as many rows each. A column of lists is two: `name`, all values one after the
other, and `name_counts`, how many of them each row has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from detector.data.annotations import cut, starts_of

COUNTS = "_counts"
JOINED = 1 << 28  # bytes of blocks that are made one


class Seen:
    """Which whole numbers came before, in 8 bytes each: sorted runs, each at least twice as long as the next."""

    def __init__(self):
        self.runs: list[np.ndarray] = []

    def has(self, values: np.ndarray) -> np.ndarray:
        """values: [n] int64. Returns [n] bool."""
        found = np.zeros(len(values), bool)
        for run in self.runs if len(values) else ():
            if run[0] <= values.max() and values.min() <= run[-1]:
                found |= run[np.searchsorted(run, values).clip(max=len(run) - 1)] == values
        return found

    def add(self, values: np.ndarray) -> np.ndarray:
        """values: [n] int64. Returns [n] bool: it was there, or stands in `values` before."""
        order = slice(None) if (values[1:] > values[:-1]).all() else np.argsort(values, kind="stable")
        ranked = values[order]
        again = self.has(ranked)
        again[1:] |= ranked[1:] == ranked[:-1]
        new = ranked[~again]
        while self.runs and len(self.runs[-1]) < 2 * len(new):
            new = np.sort(np.concatenate([self.runs.pop(), new]), kind="stable")
        if len(new):
            self.runs.append(new)
        before = np.empty(len(values), bool)
        before[order] = again
        return before


class Rows:
    """Where each of some whole numbers that differ stands among them."""

    def __init__(self, ids: np.ndarray):
        self.order = np.argsort(ids, kind="stable")
        self.ranked = ids[self.order]
        low, high = (int(self.ranked[0]), int(self.ranked[-1])) if len(ids) else (0, -1)
        self.first, self.table = low, None
        if high - low < 4 * len(ids):  # a place for every number between
            self.table = np.full(high - low + 1, -1, np.int32)
            self.table[ids - low] = np.arange(len(ids))

    def of(self, ids: np.ndarray) -> np.ndarray:
        """[n], -1 where there is none."""
        if not len(self.ranked):
            return np.full(len(ids), -1)
        inside = (self.ranked[0] <= ids) & (ids <= self.ranked[-1])
        ids = np.where(inside, ids, self.ranked[0])
        if self.table is not None:
            found = self.table[ids - self.first]
        else:
            near = np.searchsorted(self.ranked, ids)
            found = np.where(self.ranked[near] == ids, self.order[near], -1)
        return np.where(inside, found, -1)


class Codes:
    """Whole numbers from 0 for texts and numbers, alike for those that are equal."""

    def __init__(self):
        self.known: dict[str | float, int] = {}

    def of(self, values: Sequence) -> np.ndarray:
        """[n] int32, -1 for None and what is neither text nor number."""
        if values.count(None) == len(values):
            return np.full(len(values), -1, np.int32)
        known = self.known
        codes = (known.setdefault(v, len(known)) if isinstance(v, (str, int, float)) else -1 for v in values)
        return np.fromiter(codes, np.int32, len(values))


class Columns:
    """Blocks, one after the other."""

    def __init__(self):
        self.blocks: dict[str, deque[np.ndarray]] = {}
        self.length = self.loose = self.bytes = 0

    def append(self, block: Mapping[str, np.ndarray], length: int) -> None:
        for name, values in block.items():
            self.blocks.setdefault(name, deque()).append(values)
        self.length += length
        self.loose += 1
        self.bytes += sum(values.nbytes for values in block.values())
        if self.bytes > JOINED:  # the memory of many small blocks would stay with the process when they are let go
            for blocks in self.blocks.values():
                blocks.append(np.concatenate([blocks.pop() for _ in range(self.loose)][::-1]))
            self.loose = self.bytes = 0

    def take(self, name: str, places: np.ndarray | None = None) -> np.ndarray:
        """A column, whose blocks are let go; places: [length] the row of the result that each row becomes."""
        blocks = self.blocks.pop(name)
        out = np.empty((sum(map(len, blocks)), *blocks[0].shape[1:]), blocks[0].dtype)
        at = 0
        while blocks:
            values = blocks.popleft()
            rows = slice(at, at + len(values))
            out[rows if places is None else places[rows]] = values
            at += len(values)
        return out

    def take_lists(self, name: str, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A column of lists: values, and where those of each row of the result start."""
        counts = list(self.blocks[name + COUNTS])
        starts = starts_of(self.take(name + COUNTS, places))
        blocks, at = self.blocks.pop(name), 0
        out = np.empty((int(starts[-1]), *blocks[0].shape[1:]), blocks[0].dtype)
        for number, own in enumerate(counts):
            values = blocks.popleft()
            if len(values):
                shifts = starts[places[at : at + len(own)]] - starts_of(own)[:-1]
                out[np.repeat(shifts, own) + np.arange(len(values))] = values
            at += len(own)
            counts[number] = None
        return out, starts


def interleave(one: Mapping, other: Mapping, order: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of two blocks, those of `other` after those of `one`, in an order of all."""
    out = {}
    for name in one:
        if name + COUNTS not in one:
            out[name] = np.concatenate([one[name], other[name]])[order]
        else:
            counts = np.concatenate([one[name + COUNTS], other[name + COUNTS]])
            out[name] = cut(np.concatenate([one[name], other[name]]), starts_of(counts), order)[0]
    return out


def chosen(block: Mapping, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Some rows [n] bool of a block."""
    own = np.flatnonzero(rows)
    lists = {name: starts_of(block[name + COUNTS]) for name in block if name + COUNTS in block}
    return {name: cut(values, lists[name], own)[0] if name in lists else values[own] for name, values in block.items()}


def image_columns(
    ids: np.ndarray,
    sizes: np.ndarray,
    names: Sequence[str],
    negative: Sequence[Sequence[int]],
    unsure: Sequence[Sequence[int]],
    series: np.ndarray,
) -> dict[str, np.ndarray]:
    """Images as a block: ids [n] int64, sizes [n, 2] int32 (height, width), file names, LVIS's lists of labels, and
    series [n] int32."""
    texts = [name.encode() for name in names]
    columns = {
        "id": ids,
        "size": sizes,
        "series": series,
        "names": np.frombuffer(b"".join(texts), np.uint8),
        "names_counts": counts_of(texts),
    }
    for name, lists in (("negative", negative), ("unsure", unsure)):
        columns[name] = np.array(list(chain.from_iterable(lists)), np.int32)
        columns[name + COUNTS] = counts_of(lists)
    return columns


def order_of(keys: np.ndarray) -> np.ndarray:
    """The stable order of whole numbers [n] from 0 to 2^32, 16 bits at a time: such keys numpy sorts in linear time."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    high = (keys >> 16).astype(np.uint16)
    return order[np.argsort(high[order], kind="stable")] if high.any() else order


def counts_of(groups: Sequence) -> np.ndarray:
    """[groups] int32: the length of each."""
    return np.fromiter(map(len, groups), np.int32, len(groups))
