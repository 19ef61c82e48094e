"""Text for people: names from anybody's data on one line, on terminals of any encoding."""

from __future__ import annotations

import codecs
import io
import sys
import unicodedata
from collections.abc import Sequence

PLAIN = {"−": "-", "–": "-", "─": "-", "·": "-", "×": "x", "±": "+-", "≥": ">=", "≤": "<=", "→": "->", "…": "..."}
JOINERS = "\u200c\u200d"  # invisible parts of words and of emoji


def readable_streams() -> None:
    """Let stdout and stderr write what their encoding lacks in plain letters, instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="detector.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter) or escaped(letter) for letter in text), error.end


codecs.register_error("detector.plain", _plain)


def one_line(text: str) -> str:
    """A name as one line of letters: control characters, line breaks and the like become \\n, \\x1b, ...; a name of
    blanks alone gets quotes around it."""
    shown = "".join(letter if _is_shown(letter) else escaped(letter) for letter in text)
    return shown if shown.strip() else repr(text)


def few(names: Sequence[str], most: int) -> str:
    """The first of them on one line, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name) for name in names[:most]) + more


def escaped(text: str) -> str:
    """In ASCII, such as \\u732b."""
    return text.encode("unicode_escape").decode()


def width(text: str) -> int:
    """Columns that a line takes on a terminal: letters of East Asia take two, accents and joiners none."""
    return sum(
        2 if unicodedata.east_asian_width(letter) in "WF" else 0 if unicodedata.category(letter) in ("Mn", "Cf") else 1
        for letter in text
    )


def _is_shown(letter: str) -> bool:
    return letter.isprintable() or letter in JOINERS or unicodedata.category(letter) == "Zs"
