"""The notebooks of examples/notebooks: all cells run, in the order in which they stand, without a notebook server."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from tests.runs import ROOT, forks

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def run_cells(path: Path, folder: Path) -> None:
    """What the last expression of a cell gives is shown, as a notebook does."""
    os.chdir(folder)
    os.environ["TMPDIR"] = str(folder)
    names = {"__name__": "__main__"}
    for cell in cells(path):
        *body, last = ast.parse("".join(cell["source"])).body
        shown = isinstance(last, ast.Expr)
        exec(compile(ast.Module(body if shown else [*body, last], []), path.name, "exec"), names)
        if shown:
            value = eval(compile(ast.Expression(last.value), path.name, "eval"), names)
            getattr(value, "_repr_html_", lambda value=value: repr(value))()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_cells_run(path, tmp_path):
    process = forks().Process(target=run_cells, args=(path, tmp_path))
    process.start()
    process.join(240)
    process.kill()
    assert process.exitcode == 0
    assert not any(
        cell["outputs"] or cell["execution_count"] for cell in cells(path)
    )  # no output is kept: small, no paths
