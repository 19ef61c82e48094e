"""Which file of a folder each `file_name` of an annotation file means, as tools write names.

A name that is there as it stands is taken. One that is not may be written in another way: with Windows' or doubled
separators, in another case, percent-encoded, in Unicode's decomposed form, as an absolute path of the machine that
wrote it, below a folder that is not part of the image folder's own path, or with the prefix that Label Studio gives to
uploads. The file has to be the only one that fits: two are an error that names both, and nothing outside the folder is
ever looked at.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from detector.data.places import Folder

UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")  # 1a2b3c4d-photo.jpg
TRIED, DEEP, MANY = 20, 3, 1000  # files that are looked for, levels below, folders at most
SERVED = re.compile(r"^(?:file:/*|.*[?&]d=)")  # file:///home/me/photo.jpg, /data/local-files/?d=photos/photo.jpg


def leads_out(name: str) -> bool:
    """Whether a file name of an annotation file, taken as it stands, may mean a file outside the image folder."""
    return os.path.isabs(name) or ".." in name.replace("\\", "/").split("/") or "\0" in name


def find_files(folder: Folder, names: Sequence[str]) -> tuple[list[str | None], dict[int, str], dict[int, str]]:
    """The path below `folder` of each name, None where there is no file or no single one.

    Returns (paths, variants, problems): by index, how a variant was written and what was found instead; and why a name
    has no file. Folders are listed once each; the whole tree is only walked where a name is not there as it stands.
    """
    present = _listed(folder, names) if isinstance(folder, Path) else folder.listed(names)
    paths: list[str | None] = [name if name in present else None for name in names]
    variants, problems = {}, {}
    missing = [i for i, path in enumerate(paths) if path is None]
    if not missing:
        return paths, variants, problems
    taken = {path for path in paths if path is not None}
    unclear = {} if isinstance(folder, Path) else folder.unclear([names[i] for i in missing])
    by_key = defaultdict(list)
    for path in _walk(folder) if isinstance(folder, Path) else folder.walk():
        by_key[spelling_key(path)].append(path)
    for i in missing:
        found = _candidates(names[i], by_key)
        free = [path for path in found if path not in taken]
        if names[i] in unclear:
            problems[i] = unclear[names[i]]
        elif len(free) == 1:
            paths[i] = free[0]
            variants[i] = f"{names[i]!r} is {free[0]!r}"
        elif free:
            problems[i] = f"{names[i]!r} may be {' or '.join(map(repr, sorted(free)))}: give the file its exact name"
        elif found:
            problems[i] = f"{names[i]!r} would be {found[0]!r}, which another image has"
        elif leads_out(names[i]):
            problems[i] = f"{names[i]!r} leads out of the image folder, and no end of it is a file in there"
        else:
            problems[i] = f"{names[i]!r}"
    return paths, variants, problems


def find_in_folders(
    folders: Sequence[Folder], sources: np.ndarray, names: Sequence[str]
) -> tuple[list[str | None], dict[int, str], dict[int, str]]:
    """`find_files` of names [I] each of which lies below folders[sources[i]]."""
    paths: list[str | None] = [None] * len(names)
    variants, problems = {}, {}
    for source, folder in enumerate(folders):
        own = np.flatnonzero(sources == source).tolist()
        found, other, missing = find_files(folder, [names[i] for i in own])
        for i, path in zip(own, found):
            paths[i] = path
        variants |= {own[k]: text for k, text in other.items()}
        problems |= {own[k]: text for k, text in missing.items()}
    return paths, variants, problems


def nearby(folder: Path, names: Sequence[str]) -> list[Path]:
    """Folders beside `folder`, or below what holds it, that have the first of these files, those with most first."""
    some = [os.path.basename(name) if leads_out(name) else name for name in names[:TRIED]]
    counts: dict[Path, int] = {}
    for number, (place, below, _) in enumerate(os.walk(folder.parent)):
        depth = len(Path(place).relative_to(folder.parent).parts)
        below[:] = sorted(name for name in below if not name.startswith("."))[:MANY] if depth < DEEP else []
        count = max(sum((Path(place) / own(name)).is_file() for name in some) for own in (str, os.path.basename))
        if count and Path(place) != folder:
            counts[Path(place)] = count
        if number > MANY:
            break
    return sorted(counts, key=lambda place: (-counts[place], place))


def _listed(folder: Path, names: Sequence[str]) -> set[str]:
    """Files in the folders that the names lie in; a look at every file would take minutes on network storage."""
    present = set()
    for part in {name[: name.rfind("/") + 1] for name in names}:  # with its "/": of millions of names there are few
        if part and (part == "./" or os.path.normpath(part) != part[:-1] or leads_out(part)):
            continue
        with _scan(folder / part) as entries:
            for entry in entries:  # a link may lead nowhere, or to itself
                if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path):
                    present.add(part + entry.name)
    return present


def _walk(folder: Path) -> list[str]:
    """All files below a folder, with '/' between the parts of their paths."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return [path.relative_to(folder).as_posix() for path in paths if path.is_file()]  # a link may lead nowhere


class _scan:
    """os.scandir, of nothing where there is no such folder."""

    def __init__(self, folder: Path):
        self.entries = os.scandir(folder) if folder.is_dir() else None

    def __enter__(self):
        return self.entries or ()

    def __exit__(self, *_):
        if self.entries:
            self.entries.close()


def spelling_key(path: str) -> str:
    """What does not tell files apart: case and the form of Unicode."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _candidates(name: str, by_key: dict[str, list[str]]) -> list[str]:
    """The files that a name may mean: those that fit the longest end of its path, under any way to write it."""
    spellings = [part for text in dict.fromkeys((name, unquote(name))) for part in (text, SERVED.sub("", text))]
    found: dict[str, None] = {}
    longest = 0
    for spelling in dict.fromkeys(spellings):
        parts = [part for part in spelling.replace("\\", "/").split("/") if part not in ("", ".")]
        if ".." in parts:  # what lies above is nothing that this folder holds
            parts = parts[len(parts) - parts[::-1].index("..") :]
        if not parts:
            continue
        leaf = parts[-1]
        for last in dict.fromkeys((leaf, UPLOAD.sub("", leaf, count=1) if UPLOAD.match(leaf) else leaf)):
            for start in range(len(parts)):
                matches = by_key.get(spelling_key("/".join([*parts[start:-1], last])), ())
                if matches:
                    length = len(parts) - start
                    found = {} if length > longest else found
                    if length >= longest:
                        found |= dict.fromkeys(matches)
                        longest = length
                    break
    return list(found)
