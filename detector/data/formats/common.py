"""What the readers share: texts and pictures as tools leave them, and a count of what was read in another way."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from detector.data.dataset import image_suffixes

TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # after those of 32 bits, which begin alike


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
    data = path.read_bytes()
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding.upper()} ({error}): save it as UTF-8") from None


def upright_size(path: Path) -> tuple[int, int, bool]:
    """(width, height) of a picture once it is upright, and whether its EXIF data turn it; only the header is read."""
    try:
        with Image.open(path) as picture:
            turned = picture.getexif().get(0x0112) in TURNED
            return *(picture.size[::-1] if turned else picture.size), turned
    except UnidentifiedImageError:
        raise ValueError(f"image {path} cannot be read: it is in no format of a picture") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from error


def pictures(folder: Path) -> list[Path]:
    """The pictures below a folder, sorted."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in image_suffixes() and p.is_file())


def only(candidates: Sequence[Path], what: str) -> Path | None:
    """The one candidate, None if there is none. ValueError names all if there are several."""
    found = list(dict.fromkeys(candidates))
    if len(found) > 1:
        raise ValueError(f"{what} may be {' or '.join(map(str, found))}: keep one of them")
    return found[0] if found else None
