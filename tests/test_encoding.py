"""Text files are UTF-8 whatever the machine's locale is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path for part in ("*.py", "detector/**/*.py", "data/*.py", "benchmarks/*.py") for path in ROOT.glob(part)
)


NAMED = ("encoding", "force_zip64")  # the latter is of archives, whose files are bytes


def without_encoding(code: str) -> list[int]:
    """Lines that open, read or write a text file in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or any(word.arg in NAMED for word in node.keywords):
            continue
        places = node.args + [word.value for word in node.keywords if word.arg == "mode"]
        constants = [part for place in places for part in ast.walk(place) if isinstance(part, ast.Constant)]
        texts = [part.value for part in constants if isinstance(part.value, str)]
        match node.func:
            case ast.Attribute(attr="read_text" | "write_text"):
                found.append(node.lineno)
            case ast.Name(id="open") | ast.Attribute(attr="open"):
                plain = isinstance(node.func, ast.Name)
                modes = [text for text in texts if set(text) <= set("rwaxbt+")]
                if (plain or modes) and not any("b" in mode for mode in modes):
                    found.append(node.lineno)
            case ast.Attribute(attr="FileHandler" | "NamedTemporaryFile" | "TextIOWrapper"):
                if not any("b" in text for text in texts):
                    found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_file_has_its_encoding_named(path):
    assert not without_encoding(path.read_text(encoding="utf-8"))


def test_the_check_sees_what_it_should():
    lines = ["open(a)", "open(a, 'w')", "a.open('a')", "a.read_text()", "a.write_text(b)", "open(a, mode='w')"]
    for line in lines:
        assert without_encoding(line), line
    for line in ("open(a, 'rb')", "a.open('wb')", "Image.open(a)", "open(a, encoding='utf-8')", "open(a, mode='rb')"):
        assert not without_encoding(line), line
