"""The lists of a JSON file in blocks of whole elements: a file of any size takes the memory of one block.

The file is mapped, and gone through once before anything is read from it. msgspec, which builds no objects for what
nobody asked for, checks every byte; what it does not take but the standard library does (NaN, halves of characters) is
left to the latter, and what neither takes is told in the latter's words.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import mmap
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

BLOCK = 1 << 20  # bytes of a block, or one element where that is larger; what fits a cache is read fastest
LOADED = 10_000  # elements of a block of a list that is loaded
NEAR = 1 << 16  # bytes after those in which the end of an element is looked for before its brackets are counted
DIGITS = 4300  # of a whole number, at most
SPACE = re.compile(rb"[ \t\n\r]*")
BETWEEN = re.compile(rb"\}[ \t\n\r]*,[ \t\n\r]*\{")
STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
SCALAR = re.compile(rb'"(?:[^"\\]|\\.)*"|[^\s,\]}]*', re.DOTALL)
CLOSING = {b"[": b"]", b"{": b"}"}
RAW = msgspec.json.Decoder(list[msgspec.Raw])
ANY = msgspec.json.Decoder(msgspec.Raw)


class NotJSON(ValueError):
    """What the standard library's decoder says of a text."""


class Block(NamedTuple):
    """Some elements of a list that follow each other."""

    first: int  # number of the first
    count: int
    data: bytes | list  # a JSON list, or one that is loaded

    def load(self, rows: np.ndarray | None = None) -> dict[int, Any]:
        """Some or all of them by their place here, as the standard library reads them."""
        rows = range(self.count) if rows is None else rows
        if isinstance(self.data, list):
            return {int(row): self.data[row] for row in rows}
        if 2 * len(rows) < self.count:
            with contextlib.suppress(msgspec.MsgspecError, RecursionError):
                records = RAW.decode(self.data) if len(rows) else ()
                return {int(row): _loads(bytes(records[row])) for row in rows}
        records = _loads(self.data)
        return {int(row): records[row] for row in rows}


def blocks_of(source: list | JsonList) -> Iterator[Block]:
    """A list, or one of a file, block by block."""
    if isinstance(source, JsonList):
        yield from source.blocks()
        return
    for first in range(0, len(source), LOADED):
        part = source[first : first + LOADED]
        yield Block(first, len(part), part)


class JsonList:
    """A list of a JSON file; what iterates over it decodes it anew."""

    def __init__(self, text: mmap.mmap | bytes, spans: list[tuple[int, int, int]]):
        self._text, self._spans = text, spans  # where a block starts and ends, and how many elements it has

    def __len__(self) -> int:
        return sum(count for *_, count in self._spans)

    def blocks(self) -> Iterator[Block]:
        first = 0
        for start, end, count in self._spans:
            yield Block(first, count, b"[" + self._text[start:end] + b"]")
            first += count
            _forget(self._text)

    def __iter__(self) -> Iterator[Any]:
        for block in self.blocks():
            yield from _loads(block.data)


def read_lists(path: Path) -> dict[str, Any] | type:
    """The top level of a JSON file: its lists as `JsonList`, of every other value its type; of a file whose top level
    is no object, the type of that. Raises NotJSON."""
    text, start = _map(path)
    walk = _Walk(text)
    at = walk.space(start)
    if text[at : at + 1] == b"{":
        found, end = walk.members(at + 1)
    else:
        found, end = walk.value(at, "")
        found = list if isinstance(found, JsonList) else found
    if walk.space(end) != len(text):
        walk.fail("0 ", walk.space(end))
    return found


def _map(path: Path) -> tuple[mmap.mmap | bytes, int]:
    """The file in UTF-8, and where its text begins."""
    with open(path, "rb") as file:
        encoding = json.detect_encoding(file.read(4))
        file.seek(0)
        if encoding in ("utf-8", "utf-8-sig"):
            empty = not path.stat().st_size
            text = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return text, 3 if encoding == "utf-8-sig" else 0
        with tempfile.TemporaryFile() as other:
            reader = codecs.getreader(encoding)(file, errors="surrogatepass")
            try:
                for part in iter(lambda: reader.read(BLOCK), ""):
                    other.write(part.encode("utf-8", errors="surrogatepass"))
            except UnicodeError as error:
                raise NotJSON(str(error)) from None
            other.flush()
            return mmap.mmap(other.fileno(), 0, access=mmap.ACCESS_READ), 0


def _forget(text: mmap.mmap | bytes) -> None:
    """Let the system have the pages that have been read: they would count as memory of this process."""
    if hasattr(text, "madvise"):
        with contextlib.suppress(OSError):
            text.madvise(mmap.MADV_DONTNEED)


class _Walk:
    """Goes through a text, from the left to the right."""

    def __init__(self, text: mmap.mmap | bytes):
        self.text = text

    def space(self, at: int) -> int:
        return SPACE.match(self.text, at).end()

    def members(self, at: int) -> tuple[dict[str, Any], int]:
        """What an object from behind its bracket on holds, and where it ends."""
        text, found = self.text, {}
        at = self.space(at)
        if text[at : at + 1] == b"}":
            return found, at + 1
        before = "{"
        while True:
            key = STRING.match(text, at)
            colon = self.space(key.end()) if key else at
            if text[colon : colon + 1] != b":":
                self.fail(before, at)
            name = self._load(key[0], before, at)
            found[name], end = self.value(self.space(colon + 1), '{"":')
            end = self.space(end)
            if text[end : end + 1] == b"}":
                return found, end + 1
            if text[end : end + 1] != b",":
                self.fail('{"":0', end)
            before, at = '{"":0,', self.space(end + 1)

    def value(self, at: int, before: str) -> tuple[Any, int]:
        """A `JsonList` or the type of another value, and where it ends."""
        opening = self.text[at : at + 1]
        if opening in CLOSING:
            spans, end = self._spans(at + 1, opening)
            return JsonList(self.text, spans) if opening == b"[" else dict, end
        scalar = SCALAR.match(self.text, at)
        return type(self._load(scalar[0], before, at)), scalar.end()

    def _load(self, data: bytes, before: str, at: int) -> Any:
        try:
            return _loads(data)
        except (ValueError, RecursionError):
            self.fail(before, at)

    def _spans(self, at: int, opening: bytes) -> tuple[list[tuple[int, int, int]], int]:
        """The elements of a list or an object from behind its bracket on, cut into (start, end, number of elements),
        and where it ends."""
        text, spans, before = self.text, [], opening.decode()
        while True:
            near = BETWEEN.search(text, at + BLOCK, at + BLOCK + NEAR) if opening == b"[" else None
            if near and (count := self._count(text[at : near.start() + 1], opening)) is not None:
                end, closed = near.start() + 1, False
            else:
                end, closed = self._end(at, before)
                if end is None or (closed and text[end : end + 1] != CLOSING[opening]):
                    self.fail(before, at)
                blank = self.space(at) == end
                if blank and not (closed and len(before) == 1):
                    self.fail(before, at)
                data = text[at:end]
                count = 0 if blank else self._count(data, opening)
                if count is None:  # it may be what only the standard library reads
                    loaded = self._load(opening + data + CLOSING[opening], before, at)
                    count = len(loaded)
            if count:
                spans.append((at, end, count))
            _forget(text)
            if closed:
                return spans, end + 1
            before = "[0," if opening == b"[" else '{"":0,'
            at = SPACE.match(text, end).end() + 1  # behind the comma

    def _count(self, data: bytes, opening: bytes) -> int | None:
        """How many elements (1 for some members of an object); None where it is not what msgspec reads."""
        try:
            if not data.isascii():
                data.decode()
            digits = np.frombuffer(data, np.uint8)[:: DIGITS // 32] - ord("0") < 10
            if b"\1" * 32 in digits.tobytes():  # a number that the standard library may refuse
                return None
            whole = opening + data + CLOSING[opening]
            return len(RAW.decode(whole)) if opening == b"[" else len(ANY.decode(whole)) and 1
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def _end(self, at: int, before: str) -> tuple[int | None, bool]:
        """The end of the last of the elements from `at` on that fit into a block, and whether the list or object ends
        there, too; None where the text ends before."""
        size = BLOCK + NEAR
        while True:
            commas, closing = _structure(self.text[at : at + size])
            if closing is not None:
                return at + closing, True
            if len(commas):
                return at + int(commas[-1]), False
            if at + size >= len(self.text) or (size > 8 * BLOCK and self._is_wrong(at, size, before)):
                return None, False
            size *= 2

    def _is_wrong(self, at: int, size: int, before: str) -> bool:
        """Whether a long element without an end has its fault here, and not only because more of it follows."""
        text = self.text[at : at + size].decode("utf-8", errors="replace")
        try:
            json.loads(before + text)
        except json.JSONDecodeError as error:
            return error.pos < len(text) - 100 and "Unterminated" not in error.msg
        except (ValueError, RecursionError):
            return True

    def fail(self, before: str, at: int) -> None:
        """Raise the standard library's error for the text from `at` on, where what stands before it is as `before`."""
        size, error = BLOCK, None
        while True:
            data = self.text[at : at + size]
            last = at + size >= len(self.text)
            try:
                text = data.decode("utf-8", errors="surrogatepass")
            except UnicodeDecodeError as wrong:
                if last or wrong.start < len(data) - 4:
                    raise NotJSON(_moved(wrong, at)) from None
                text = data[: wrong.start].decode("utf-8", errors="surrogatepass")
            try:
                json.loads(before + text)
                raise AssertionError(f"{before} and the text from {at} on is JSON")
            except json.JSONDecodeError as found:
                error = found
            except (ValueError, RecursionError) as found:
                raise NotJSON(str(found)) from None
            if last or (error.pos < len(before) + len(text) - 100 and "Unterminated" not in error.msg):
                break
            size *= 2
        characters, lines, column = self._count_characters(at)
        inside = text[: error.pos - len(before)] if error.pos > len(before) else ""
        position = characters + error.pos - len(before)
        lines += inside.count("\n")
        column = len(inside) - inside.rfind("\n") if "\n" in inside else column + error.pos - len(before) + 1
        raise NotJSON(f"{error.msg}: line {lines + 1} column {column} (char {position})")

    def _count_characters(self, end: int) -> tuple[int, int, int]:
        """Characters before a place, line breaks, and characters since the last of those."""
        characters = lines = column = 0
        start = 3 if self.text[:3] == codecs.BOM_UTF8 else 0
        for at in range(start, end, BLOCK):
            data = self.text[at : min(at + BLOCK, end)]
            first = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
            characters += int(first.sum())
            lines += data.count(b"\n")
            after = data.rfind(b"\n") + 1
            column = int(first[after:].sum()) + (0 if after else column)
        return characters, lines, column


def _loads(data: bytes) -> Any:
    return json.loads(data.decode("utf-8", errors="surrogatepass"))


def _moved(error: UnicodeDecodeError, by: int) -> str:
    """The words of an error in a part of a text, with its place in the whole text."""
    if error.end - error.start == 1:
        where = f"byte 0x{error.object[error.start]:02x} in position {error.start + by}"
    else:
        where = f"bytes in position {error.start + by}-{error.end - 1 + by}"
    return f"'utf-8' codec can't decode {where}: {error.reason}"


def _structure(data: bytes) -> tuple[np.ndarray, int | None]:
    """Where the commas between elements are that begin in `data`, and its first bracket that closes what encloses it;
    None where there is none."""
    text = np.frombuffer(data, np.uint8)
    low = text | 0x20  # [ and {, ] and } differ by this bit
    places = np.flatnonzero((text == ord('"')) | (text == ord(",")) | (low == ord("{")) | (low == ord("}")))
    if b"\\" in data:
        slashes = np.flatnonzero(text == ord("\\"))
        begins = np.diff(slashes, prepend=-2) != 1
        number = np.arange(len(slashes)) - np.maximum.accumulate(np.where(begins, np.arange(len(slashes)), 0))
        places = np.setdiff1d(places, slashes[number % 2 == 0] + 1, assume_unique=True)
    kinds = text[places]
    quotes = kinds == ord('"')
    free = ~np.logical_xor.accumulate(quotes) & ~quotes if len(quotes) else quotes
    places, kinds = places[free], kinds[free]
    low = kinds | 0x20
    depth = np.cumsum((low == ord("{")).astype(np.int8) - (low == ord("}")), dtype=np.int32)
    closing = np.flatnonzero(depth < 0)[:1]
    end = int(places[closing[0]]) if len(closing) else None
    commas = places[(kinds == ord(",")) & (depth == 0)]
    return commas, end
