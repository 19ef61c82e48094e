"""What several tests share: the real data beside the project, where there is any, and a tiny generated data set."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import settings

settings.register_profile("project", deadline=None)  # shared machines stall
settings.load_profile("project")

ROOT = Path(__file__).resolve().parents[1]

# Continuous integration tries the same examples every time; elsewhere each run tries new ones.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data sets; tests that want it are skipped where it is missing."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"no real data: {folder / 'data'} is missing")
    return folder


@pytest.fixture(scope="session")
def shapes_tiny(tmp_path_factory) -> Path:
    """The shapes data set in small: 24 train and 8 val images of 96 x 96 px."""
    out = tmp_path_factory.mktemp("shapes_tiny")
    script = [sys.executable, ROOT / "data" / "make_shapes.py", "--out", out]
    subprocess.run([*script, "--train", "24", "--val", "8", "--size", "96", "--seed", "1"], check=True)
    return out


@pytest.fixture(scope="session")
def coco():
    """The module data/prepare_coco.py."""
    spec = importlib.util.spec_from_file_location("prepare_coco", ROOT / "data" / "prepare_coco.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
