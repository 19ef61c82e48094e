"""What several tests share: the real data beside the project, where there is any, and a tiny generated data set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hypothesis import settings

from tests.runs import config, five, make_tiny_shapes, points, program, run, two_ranks  # noqa: F401  fixtures
from tests.untrained import checkpoint, run_config, state  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]

# Continuous integration tries the same examples every time; elsewhere each run tries new ones. Shared machines stall.
settings.register_profile("project", derandomize=bool(os.environ.get("CI")), deadline=None)
settings.load_profile("project")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets; tests that want it are skipped where it is missing."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder / 'data'} is missing")
    return folder


@pytest.fixture(scope="session")
def shapes_tiny(tmp_path_factory) -> Path:
    """The shapes data set in small: see make_tiny_shapes."""
    return make_tiny_shapes(tmp_path_factory.mktemp("shapes_tiny"))


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *arguments): a program in this process -> (its exit code, stdout, stderr)."""

    def go(main, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # main sets it and Hydra its own config: undone after the test
        monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        try:
            code = main() or 0
        except SystemExit as end:
            code = end.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return go
