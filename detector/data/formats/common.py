"""What the readers share: texts and pictures as tools leave them, and a count of what was read in another way."""

from __future__ import annotations

import codecs
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import unquote

from PIL import Image, UnidentifiedImageError

from detector.data.file_names import spelling_key
from detector.data.picture_files import image_suffixes

TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # after those of 32 bits, which begin alike
HIDDEN = (".", "__MACOSX")  # what the names of hidden files, and of macOS's leavings in archives, begin with


class Notes:
    """What was read although it is not as the format says, by kind."""

    def __init__(self):
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, where: object) -> None:
        self.found.setdefault(kind, []).append(str(where))

    def lines(self) -> list[str]:
        """One line for each kind: how often, and where at first."""
        return [
            f"{len(places)} x {kind}: {'; '.join(places[:3])}{'; ...' if len(places) > 3 else ''}"
            for kind, places in self.found.items()
        ]


def read_text(path: Path) -> str:
    """A text file: UTF-8, or what its byte-order mark says. ValueError names the file and the way out."""
    try:
        return decode(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not {error}: save it as UTF-8") from None


def decode(data: bytes, encoding: str = "utf-8") -> str:
    """Text in `encoding`, unless a byte-order mark says another. ValueError says what it is not."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), encoding)
    try:
        text = data.decode(encoding)
    except (UnicodeError, LookupError) as error:
        raise ValueError(f"{encoding.upper()} ({error})") from None
    if "\0" in text:
        raise ValueError("UTF-8 (it holds zero bytes, as UTF-16 without its mark does)")
    return text


def upright_size(path: Path) -> tuple[int, int, bool]:
    """(width, height) of a picture once it is upright, and whether its EXIF data turn it."""
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(0x0112) in TURNED
            return *(picture.size[::-1] if turned else picture.size), turned
    except UnidentifiedImageError:
        raise ValueError(f"image {path} cannot be read: it is in no format of a picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def pictures(folder: Path) -> list[Path]:
    """The pictures below a folder, sorted, without hidden ones."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in image_suffixes())
    return sorted(p for p in found if not is_hidden(p.relative_to(folder)) and p.is_file())


def is_hidden(path: Path) -> bool:
    return any(part.startswith(HIDDEN) for part in path.parts)


class Stems:
    """The files of a folder with one of some suffixes, in any case, by their names without it.

    A name that is there as it stands is taken; else those that differ from it in case, percent-encoding or the form of
    Unicode only. The folder need not exist.
    """

    def __init__(self, folder: Path, suffixes: Collection[str]):
        self.folder = folder
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name) if folder.is_dir() else []
        entries = [entry for entry in entries if os.path.splitext(entry.name)[1].lower() in suffixes]
        self.files = [folder / e.name for e in entries if not e.name.startswith(HIDDEN) and e.is_file()]
        self._exact, self._spelt = defaultdict(list), defaultdict(list)
        for path in self.files:
            self._exact[path.stem].append(path)
            self._spelt[_plain(path.stem)].append(path)

    def find(self, stem: str) -> list[Path]:
        return self._exact.get(stem) or self._spelt.get(_plain(stem), [])


def _plain(stem: str) -> str:
    return spelling_key(unquote(stem, errors="surrogateescape"))


def only(candidates: Sequence[Path], what: str) -> Path | None:
    """The one candidate, None if there is none. ValueError names all if there are several."""
    found = list(dict.fromkeys(candidates))
    if len(found) > 1:
        raise ValueError(f"{what} may be {' or '.join(map(str, found))}: keep one of them")
    return found[0] if found else None


def fit(box: Sequence[float], width: int, height: int, where: str, notes: Notes) -> list[float]:
    """[x, y, w, h] of a box (x1, y1, x2, y2), cut where it reaches out of its picture.

    One that is outside or of no size stays as it is, with a note: such boxes are left out where they are read.
    """
    x1, y1, x2, y2 = box
    if x2 - x1 < 1e-2 or y2 - y1 < 1e-2:
        notes.add("box of no size, of which nothing is learnt", where)
        return [x1, y1, x2 - x1, y2 - y1]
    if x1 > width - 1e-2 or y1 > height - 1e-2 or x2 < 1e-2 or y2 < 1e-2:
        notes.add("box outside its picture, of which nothing is learnt", where)
        return [x1, y1, x2 - x1, y2 - y1]
    if beyond(box, width, height) > 1:  # less is rounding
        notes.add("box that reaches out of its picture, cut", where)
    x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    return [x1, y1, x2 - x1, y2 - y1]


def beyond(box: Sequence[float], width: int, height: int) -> float:
    """By how many pixels a box (x1, y1, x2, y2) reaches out of its picture at most."""
    x1, y1, x2, y2 = box
    return max(-x1, -y1, x2 - width, y2 - height)
