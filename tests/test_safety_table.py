"""docs/reliability.md says what is so: every test that it names is there, and every test of a fault is named."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
FAULTS = ["tests/engine/test_survival.py", "tests/engine/test_faults.py", "tests/test_safety.py"]
SOUND = {"test_our_transforms_are_trusted"}  # what must go on working


def defined_in(file: str) -> list[str]:
    return re.findall(r"^def (test_\w+)\(", (ROOT / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_every_test_that_is_named_exists(file):
    named = {test for other, test in NAMED if other == file}
    assert named <= set(defined_in(file))


@pytest.mark.parametrize("file", FAULTS)
def test_every_test_of_a_fault_is_named(file):
    assert set(defined_in(file)) - SOUND <= {test for other, test in NAMED if other == file}


def test_every_row_is_complete_and_names_a_test():
    rows = [
        line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| fault", "| property"))
    ]
    rows = [row for row in rows if not row.startswith("| ---")]
    assert len(rows) > 40
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) in (2, 4) and all(cells), row
        assert re.fullmatch(r"(`tests/[\w/]+\.py::\w+`(, )?)+", cells[-1]), row
