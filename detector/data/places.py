"""Where pictures lie: in a folder, in tar shards as WebDataset lays them out, or behind an address that fsspec knows.

A folder is a Path. `Shards` and `Address` stand in its place: `place / name` is an `Entry`, which is opened, read and
printed as a Path is. What is read depends on the name alone, so the order of training is that of a folder.

Of shards an index is made once, where each member begins and ends, and kept beside the stored annotations. It is sorted
by name and mapped by every process; a name is found by halving. Local shards are read by position (pread) and
addresses by fsspec's file system of the process, so nothing is shared that a fork could break.
"""

from __future__ import annotations

import bisect
import contextlib
import glob
import hashlib
import io
import itertools
import json
import logging
import os
import re
import tarfile
import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

import numpy as np

from detector.data.annotations import starts_of
from detector.data.store import SMALL, in_one_step

logger = logging.getLogger(__name__)

T = TypeVar("T")
TRIES, PAUSE = 4, 0.5  # how often an address is asked, and the seconds before the second time, doubled each time
WAIT = 60  # seconds for a server to say something
SEVERAL = 16  # addresses that are asked at once
FEW = 20  # names that are looked for one by one, not in a list of all
HEAD, AHEAD = 1 << 16, 1 << 22  # bytes that are read at once: where a header is wanted, of whole shards
OPEN = 256  # shards that a process keeps open
VERSION = 1  # of the index that is stored
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|zip)$", re.IGNORECASE)
REMOTE = "pip install 'two-stage-detector[remote]'"
BY_REMOTE = ("http", "https", "s3", "s3a", "hf")  # what that installs


class Entry(NamedTuple):
    """A file in a place, named as a Path below a folder is."""

    place: Place
    name: str

    def __str__(self) -> str:
        return self.place.path_of(self.name)

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    def is_file(self) -> bool:
        return bool(self.place.listed([self.name]))

    def size(self) -> int | None:
        """In bytes; None where only the server knows. Raises FileNotFoundError."""
        return self.place.size(self.name)

    def read_bytes(self) -> bytes:
        return self.place.read(self.name)

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file, of which only what is read is fetched."""
        return self.place.open(self.name)


class Place(ABC):
    """A folder of pictures that is none. `text` is the setting: places are told apart by it."""

    def __init__(self, text: str):
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __truediv__(self, name: str) -> Entry:
        return Entry(self, name)

    def is_dir(self) -> bool:
        """Whether it can be used now."""
        try:
            self.check()
        except (OSError, ValueError):
            return False
        return True

    @abstractmethod
    def check(self) -> list[str]:
        """What of it is damaged. Raises OSError or ValueError, naming the place, where nothing of it can be used."""

    @abstractmethod
    def listed(self, names: Sequence[str]) -> set[str]:
        """Those of the names that are files in it."""

    @abstractmethod
    def walk(self) -> list[str]:
        """The names of all its files, where it tells."""

    def unclear(self, names: Sequence[str]) -> dict[str, str]:
        """Those of the names that mean several files, and which."""
        return {}

    @abstractmethod
    def lacks(self, name: str) -> str:
        """How messages say that it has no such file."""

    @abstractmethod
    def path_of(self, name: str) -> str:
        """What messages call a file."""

    @abstractmethod
    def size(self, name: str) -> int | None: ...

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def open(self, name: str) -> BinaryIO: ...


Folder = Path | Place


def as_places(given: Any, root: str | Path = "", cache: str | os.PathLike | None = None) -> tuple[Folder, ...]:
    """One folder or several, as several; paths count from `root`. cache: where the index of shards is kept.

    Raises ValueError for addresses and files that pictures are not read from.
    """
    several = [given] if isinstance(given, (str, os.PathLike, Place)) else given
    return tuple(item if isinstance(item, Place) else _place(os.fspath(item), Path(root), cache) for item in several)


def is_address(text: str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]+://", text) is not None


def _place(text: str, root: Path, cache: str | os.PathLike | None) -> Folder:
    if is_address(text):
        _check_address(text)
        text = quote(text, safe="/:%{}*[],=+~!$&'();@") if text.startswith("http") else text
        text = text.rstrip("/")
    else:
        path = root / text
        if not COMPRESSED.search(text) and (path.is_dir() or not text.lower().endswith(".tar")):
            return Shards(str(path / "*.tar"), cache) if _holds_shards(path) else path
        text = str(path)
    if COMPRESSED.search(text):
        raise ValueError(f"{text}: pictures cannot be read one by one from what is compressed: unpack it to .tar")
    return Shards(text, cache) if text.lower().endswith(".tar") else Address(text)


def _holds_shards(folder: Path) -> bool:
    """Whether there are .tar files in a folder, and nothing else that could hold pictures."""
    if not folder.is_dir():
        return False
    found = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".tar"):
                found = True
            elif not entry.name.startswith(".") and not entry.name.endswith((".json", ".txt", ".idx", ".md")):
                return False
    return found


def _check_address(text: str) -> None:
    protocol, parts = text.partition("://")[0], urlsplit(text)
    web = protocol in ("http", "https")
    if parts.password is not None or (web and (parts.username is not None or parts.query)):
        raise ValueError(
            f"{cleaned(text)}: an address with a password or a query would be kept in config.yaml and checkpoints. "
            "Give it without, and keys as its file system looks for them: ~/.netrc, AWS_ACCESS_KEY_ID, HF_TOKEN"
        )
    file_system(text)


# ------------------------------------------------------------------------------------------------------------ addresses


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system for an address, that of this process and thread, and the path there."""
    import fsspec

    protocol, options = address.partition("://")[0], {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            patience = aiohttp.ClientTimeout(total=None, sock_connect=WAIT, sock_read=WAIT)
            options = {"client_kwargs": {"trust_env": True, "timeout": patience}, "encoded": True}
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        mend = REMOTE if protocol in BY_REMOTE else str(error)
        raise ValueError(f"{address}: {protocol}:// needs a package that is not installed: {mend}") from None
    except ValueError as error:
        raise ValueError(
            f"{cleaned(address)}: {cleaned(str(error))}: fsspec knows s3, hf, https, gs and others"
        ) from None


def cleaned(text: str) -> str:
    """A message without what may be a key in the addresses in it: a name and password, a query."""
    return re.sub(r"(\w://)[^\s/@'\"]+@", r"\1", re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\",)]*", r"\1", text))


def tried(what: str, act: Callable[[], T]) -> T:
    """What `act` gives, which asks a server: asked again after a pause where another time may help.

    Raises FileNotFoundError, and OSError that names `what` and says what happened, without keys.
    """
    for number in range(1, TRIES + 1):
        try:
            return act()
        except Exception as error:  # every file system has its own
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            status = getattr(cause, "status", None)
            if isinstance(cause, FileNotFoundError) or status in (404, 410):
                raise FileNotFoundError(f"{what} does not exist") from None
            final = isinstance(cause, (PermissionError, NotImplementedError, ValueError, ImportError))
            final |= status is not None and 400 <= status < 500 and status not in (408, 425, 429)
            if final or number == TRIES:
                said = cleaned(" ".join(f"{type(cause).__name__}: {cause}".split()))[:300]
                raise OSError(f"{what}: {said}{f' ({number} tries)' if number > 1 else ''}") from None
            logger.debug("%s: try %d: %s", what, number, type(cause).__name__)
            time.sleep(PAUSE * 2 ** (number - 1))
    raise AssertionError


def fetch(address: str, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes of a file from `start` to `end`. Raises as `tried`."""

    def act() -> bytes:
        system, path = file_system(address)
        data = system.cat_file(path, start=start, end=end)
        if start is not None and end is not None and len(data) != end - start:
            many = len(data) > end - start
            raise (NotImplementedError if many else OSError)(
                "the server does not send parts of files (HTTP Range)"
                if many
                else f"{len(data)} of {end - start} bytes from {start} on came"
            )
        return data

    return tried(address, act)


def _info(address: str) -> dict[str, Any]:
    def act() -> dict[str, Any]:
        system, path = file_system(address)
        return system.info(path)

    return tried(address, act)


class _Parts(io.RawIOBase):
    """A file of `size` bytes of which read(start, end) gives parts."""

    name = ""  # pydicom asks for it

    def __init__(self, read: Callable[[int, int], bytes], size: int):
        self.part, self.size, self.position = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer) -> int:
        end = min(self.position + len(buffer), self.size)
        data = self.part(self.position, end) if end > self.position else b""
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class Address(Place):
    """A folder behind an address. Of servers that do not list their files, those of the web, names are believed, but
    for some that are looked at."""

    def __init__(self, text: str):
        super().__init__(text)
        self.web = text.startswith("http")

    def path_of(self, name: str) -> str:
        return f"{self.text}/{quote(name) if self.web else name}"

    def lacks(self, name: str) -> str:
        return self.path_of(name)

    def __reduce__(self):
        return Address, (self.text,)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Of all files, where the server lists them."""

        def act() -> dict[str, int]:
            system, top = file_system(self.text)
            start = len(top.rstrip("/")) + 1
            return {path[start:]: int(about["size"] or 0) for path, about in system.find(top, detail=True).items()}

        return tried(self.text, act)

    def check(self) -> list[str]:
        """Whether a server of the web is there its first file shows."""
        if not self.web and not self._sizes:
            raise FileNotFoundError(f"{self.text}: no such folder, or nothing in it")
        return []

    def listed(self, names: Sequence[str]) -> set[str]:
        own = [name for name in names if ".." not in name.split("/") and not name.startswith("/")]
        if len(own) > FEW and not self.web:
            return self._sizes.keys() & set(own)
        looked_at = own if len(own) <= FEW else [own[i] for i in np.linspace(0, len(own) - 1, FEW).astype(int)]
        with ThreadPoolExecutor(SEVERAL) as pool:
            there = dict(zip(looked_at, pool.map(self._is_there, looked_at)))
        if not any(there.values()):
            return set()
        return {name for name in own if there.get(name, True)}

    def _is_there(self, name: str) -> bool:
        try:
            return _info(self.path_of(name))["type"] == "file"
        except FileNotFoundError:
            return False

    def walk(self) -> list[str]:
        return [] if self.web else list(self._sizes)

    def size(self, name: str) -> int | None:
        if self.web:
            return None
        if name not in self._sizes:
            raise FileNotFoundError(f"{self.path_of(name)} does not exist")
        return self._sizes[name]

    def read(self, name: str) -> bytes:
        return fetch(self.path_of(name))

    def open(self, name: str) -> BinaryIO:
        size = _info(self.path_of(name)).get("size")
        if size is None or size <= HEAD:
            return io.BytesIO(self.read(name))
        return io.BufferedReader(_Parts(lambda start, end: fetch(self.path_of(name), start, end), size), HEAD)


# --------------------------------------------------------------------------------------------------------------- shards


@lru_cache(OPEN)
def _opened(shard: str) -> io.FileIO:
    return open(shard, "rb", buffering=0)  # one that is let go is closed by its last user


def _part(shard: str, start: int, end: int) -> bytes:
    """Bytes of a shard. Raises OSError that names it."""
    if is_address(shard):
        return fetch(shard, start, end)
    file = _opened(shard)
    parts, at = [], start
    while at < end and (data := os.pread(file.fileno(), end - at, at)):  # the system gives at most 2 GB at once
        parts.append(data)
        at += len(data)
    if at < end:
        raise OSError(f"{shard} ends {end - at} bytes before the end of this file")
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Names(Sequence):
    """Texts that lie one after the other in an array, as bytes."""

    def __init__(self, text: np.ndarray, starts: np.ndarray):
        self.text, self.starts = text, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> bytes:
        return self.text[self.starts[row] : self.starts[row + 1]].tobytes()


class Index(NamedTuple):
    """Where the M members of shards lie, sorted by their names."""

    shards: list[str]
    damage: list[str]  # what is wrong with them
    names: np.ndarray  # UTF-8 text, cut by name_starts [M + 1]
    name_starts: np.ndarray
    shard: np.ndarray  # [M] int32
    offsets: np.ndarray  # [M] int64
    sizes: np.ndarray  # [M] int64

    def rows(self, name: str) -> range:
        """The members of this name."""
        key, names = name.encode("utf-8", "surrogateescape"), _Names(self.names, self.name_starts)
        first = bisect.bisect_left(names, key)
        return range(first, bisect.bisect_right(names, key, lo=first))

    def all_names(self) -> list[str]:
        text, starts = self.names.tobytes(), self.name_starts.tolist()
        return [text[a:b].decode("utf-8", "surrogateescape") for a, b in itertools.pairwise(starts)]


class Shards(Place):
    """The members of tar files. `text` is a path or an address of one, with {000000..000009}, {a,b} and * for more."""

    def __init__(self, text: str, cache: str | os.PathLike | None = None):
        super().__init__(text)
        self.cache = Path(cache).expanduser() if cache else None
        self.stored: Path | None = None

    def __reduce__(self):
        return _again, (self.text, self.cache, self.stored, None if self.stored else self.index)

    @cached_property
    def index(self) -> Index:
        _opened.cache_clear()  # they may have been written anew
        shards, missing = expanded(self.text)
        with ThreadPoolExecutor(SEVERAL) as pool:
            stamps = list(pool.map(_stamp, shards))
        missing += [f"{shard} does not exist" for shard, stamp in zip(shards, stamps) if stamp is None]
        found = [(shard, *stamp) for shard, stamp in zip(shards, stamps) if stamp is not None]
        if not found:
            raise FileNotFoundError(f"{self.text}: no shard fits this; give the path of .tar files")
        if self.cache is None or sum(size for _, size, _ in found) < SMALL:
            return make_index([shard for shard, *_ in found], missing)
        key = hashlib.sha256(json.dumps([VERSION, found, missing]).encode()).hexdigest()[:24]
        place = self.cache / f"shards-{key}"
        if not place.is_dir():
            made = make_index([shard for shard, *_ in found], missing)
            try:
                save(made, place)
            except OSError as error:
                logger.warning("the index of %s cannot be stored in %s: %s", self.text, place, error)
                return made
        self.stored = place
        return load(place)

    def check(self) -> list[str]:
        return self.index.damage

    def listed(self, names: Sequence[str]) -> set[str]:
        if len(names) <= FEW:
            return {name for name in names if len(self.index.rows(name)) == 1}
        there = self.index.all_names()
        return ({*there} - {*_repeated(there)}) & set(names)

    def walk(self) -> list[str]:
        there = self.index.all_names()
        return list({*there} - {*_repeated(there)})

    def unclear(self, names: Sequence[str]) -> dict[str, str]:
        twice = {*_repeated(self.index.all_names())} & set(names)
        shards, of = self.index.shards, self.index.shard
        found = {name: " and in ".join(shards[of[row]] for row in self.index.rows(name)) for name in twice}
        return {name: f"{name!r} is in {text}: which one is meant?" for name, text in found.items()}

    def lacks(self, name: str) -> str:
        count = len(self.index.shards)
        return f"{name!r}, which is not in {self.text}{f' ({count} shards)' if count > 1 else ''}"

    def path_of(self, name: str) -> str:
        rows = self.index.rows(name)
        return f"{self.index.shards[self.index.shard[rows[0]]] if rows else self.text}/{name}"

    def _where(self, name: str) -> tuple[str, int, int]:
        rows = self.index.rows(name)
        if not rows:
            raise FileNotFoundError(f"{self.lacks(name)}")
        start = int(self.index.offsets[rows[0]])
        return self.index.shards[self.index.shard[rows[0]]], start, start + int(self.index.sizes[rows[0]])

    def size(self, name: str) -> int:
        _, start, end = self._where(name)
        return end - start

    def read(self, name: str) -> bytes:
        return _part(*self._where(name))

    def open(self, name: str) -> BinaryIO:
        shard, first, end = self._where(name)
        return io.BufferedReader(_Parts(lambda a, b: _part(shard, first + a, first + b), end - first), HEAD)


def _again(text: str, cache: Path | None, stored: Path | None, index: Index | None) -> Shards:
    """Shards in another process, with the index that this one used."""
    shards = Shards(text, cache)
    shards.stored, shards.index = stored, load(stored) if index is None else index
    return shards


def expanded(pattern: str) -> tuple[list[str], list[str]]:
    """The shards that a pattern names, and which of its parts name none."""
    shards, missing = [], []
    for one in _without_braces(pattern):
        if not glob.has_magic(one.partition("://")[2] or one):
            shards.append(one)
            continue
        if is_address(one):
            protocol = one.partition("://")[0]
            system, path = file_system(one)
            paths = tried(one, lambda system=system, path=path: sorted(system.glob(path)))
            found = [path if is_address(path) else f"{protocol}://{path}" for path in paths]
        else:
            found = sorted(glob.glob(one, recursive=True))
        missing += [] if found else [f"{one}: no shard fits this"]
        shards += found
    return list(dict.fromkeys(shards)), missing


def _without_braces(pattern: str) -> list[str]:
    """Patterns with each choice of {a,b} and {first..last}, whose numbers keep their zeros."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        width = len(numbers[1]) if numbers[1][0] == "0" else 1
        choices = [f"{number:0{width}}" for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        choices = found[1].split(",") if "," in found[1] else []
    if not choices:
        raise ValueError(f"{pattern}: {found[0]} names no shards: {{000000..000009}} or {{a,b}} does")
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [one for choice in choices for one in _without_braces(f"{head}{choice}{tail}")]


def _stamp(shard: str) -> tuple[int, str] | None:
    """The size of a shard and what tells its content from another of that size; None where there is none."""
    try:
        if not is_address(shard):
            status = os.stat(shard)
            return status.st_size, str(status.st_mtime_ns)
        about = _info(shard)
    except FileNotFoundError:
        return None
    if about.get("size") is None:
        raise OSError(f"{shard}: the server does not tell its size, so parts of it cannot be read")
    keys = ("ETag", "etag", "md5Hash", "checksum", "blob_id", "generation", "Last-Modified", "LastModified", "mtime")
    return int(about["size"]), next((str(about[key]) for key in keys if about.get(key)), "")


def make_index(shards: list[str], missing: Sequence[str] = ()) -> Index:
    """The index of tar files, each read once in its order; of two members of a name in one the last counts, as tar
    itself has it. A damaged one is taken as far as it goes."""
    if len(shards) > 1 and is_address(shards[0]):
        with ThreadPoolExecutor(SEVERAL) as pool:
            read = list(pool.map(_members, shards))
    else:
        read = list(map(_members, shards))
    names = list(itertools.chain.from_iterable(own for own, *_ in read))
    shard = np.repeat(np.arange(len(shards), dtype=np.int32), [len(own) for own, *_ in read])
    order = sorted(range(len(names)), key=names.__getitem__)  # of one name in the order of shards, and in them
    again = [names[a] == names[b] and shard[a] == shard[b] for a, b in itertools.pairwise(order)]
    order = [row for row, followed in zip(order, [*again, False]) if not followed]
    text = b"".join([names[row] for row in order])
    rows = np.array(order, np.int64)
    return Index(
        shards,
        [*missing, *itertools.chain.from_iterable(wrong for *_, wrong in read)],
        np.frombuffer(text, np.uint8),
        starts_of(np.array([len(names[row]) for row in order], np.int64)),
        shard[rows],
        np.concatenate([where[:, 0] for _, where, _ in read])[rows],
        np.concatenate([where[:, 1] for _, where, _ in read])[rows],
    )


def _members(shard: str) -> tuple[list[bytes], np.ndarray, list[str]]:
    """Names, [M, 2] offsets and sizes of the files in a tar that may be pictures, and what is wrong with it."""
    names, places = [], array("q")
    count = 0
    with contextlib.ExitStack() as stack:
        if is_address(shard):
            size = int(_info(shard)["size"])
            fetch(shard, 0, min(size, 1))  # a server that sends all of it instead is told before it does so by parts
            parts = _Parts(lambda start, end: fetch(shard, start, end), size)
            file: Any = stack.enter_context(io.BufferedReader(parts, AHEAD))
        else:
            file = stack.enter_context(open(shard, "rb"))
        wrong = []
        try:
            tar = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
            while (member := tar.next()) is not None:
                tar.members.clear()  # it would keep all
                count += 1
                if member.isreg() and not member.issparse() and not member.name.endswith(".json"):
                    names.append(member.name.removeprefix("./").encode("utf-8", "surrogateescape"))
                    places.extend((member.offset_data, member.size))
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # where tarfile finds no header it takes the rest for nothing
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
        except (tarfile.TarError, EOFError) as error:
            if count and "unexpected end" in str(error):  # of the last one
                ends = file.seek(0, io.SEEK_END)
                while places and sum(places[-2:]) > ends:
                    names.pop()
                    del places[-2:]
                count -= 1
            wrong = [f"{shard} is no whole tar ({error}): its first {count} files are there"]
    return names, np.array(places, np.int64).reshape(-1, 2), wrong


def _repeated(names: Sequence[str]) -> list[str]:
    """Those that come twice in sorted names."""
    return [one for one, other in itertools.pairwise(names) if one == other]


def save(index: Index, place: Path) -> None:
    with in_one_step(place) as draft:
        for name, value in index._asdict().items():
            if isinstance(value, np.ndarray):
                np.save(draft / f"{name}.npy", value)
        about = {"shards": index.shards, "damage": index.damage}
        (draft / "about.json").write_text(json.dumps(about), encoding="utf-8")


def load(place: Path) -> Index:
    """The index that `save` wrote, mapped."""
    try:
        about = json.loads((place / "about.json").read_text(encoding="utf-8"))
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in Index._fields if name not in about}
        return Index(**about, **{name: np.asarray(array) for name, array in arrays.items()})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the stored index {place} is damaged ({error}): remove this folder") from error
