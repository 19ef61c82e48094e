"""No import of the package runs back up."""

from __future__ import annotations

from benchmarks.layout import FLOORS, PACKAGE, imports_upwards


def test_every_folder_imports_only_what_stands_below_it():
    assert imports_upwards() == {}


def test_everything_has_its_place_in_the_order():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert parts - {"__init__"} == set(FLOORS)


def test_what_runs_up_is_found(tmp_path):
    (tmp_path / "roi").mkdir()
    (tmp_path / "roi" / "align.py").write_text(
        "from detector import ops, model\n"
        "from detector.structures import Batch\n"
        "def f():\n    import detector.heads.box\n"
        "from ..engine import train\nfrom . import pool\nfrom detector import load\n"
    )
    assert imports_upwards(tmp_path) == {
        ("roi", "model"): ["roi/align.py:1"],
        ("roi", "heads"): ["roi/align.py:4"],
        ("roi", "engine"): ["roi/align.py:5"],
        ("roi", "load"): ["roi/align.py:7"],
    }
