"""The wheel, and a project of its own that uses it, in an environment with nothing of this checkout on its path."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import detector
from detector.commands.main import COMMANDS
from detector.config import CONFIGS

ROOT = CONFIGS.parent
EXAMPLE = ROOT / "examples" / "own_roi_method"


# What a machine with PyTorch and a GPU but no package index has beside it.
BESIDE_TORCH = {"torch", "torchvision", "numpy", "pyyaml", "opencv-python-headless", "tensorboard", "matplotlib"}
BESIDE_TORCH |= {"scipy", "safetensors", "tqdm", "pillow", "tifffile", "psutil", "filelock", "fsspec"}


def test_a_gpu_without_an_index_gets_all_dependencies():
    """`make wheels` carries what such a machine lacks; a new dependency must be named there or here."""
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.match(r"[\w-]+", need).group() for need in needs}
    carried = re.search(r"^MISSING := ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M).group(1)
    assert names - BESIDE_TORCH <= set(carried.replace("\\", " ").split())


def build_wheel(source: Path, names: list[str], work: Path) -> Path:
    """The wheel of the project in `source`, built from a copy of these files so that nothing is left there."""
    copy = work / source.name
    copy.mkdir(parents=True)
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source / name, copy / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", work]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, copy], check=True, cwd=work)
    return next(work.glob("*.whl"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> list[Path]:
    work = tmp_path_factory.mktemp("wheels")
    ours = build_wheel(ROOT, ["pyproject.toml", "README.md", "LICENSE", "detector", "configs"], work / "detector")
    return [ours, build_wheel(EXAMPLE, ["pyproject.toml", "own_roi"], work / "own")]


@pytest.fixture(scope="module")
def environment(wheels, tmp_path_factory) -> Path:
    """bin/ of an environment with the wheels, which sees the dependencies of this one and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    where = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run([python, *where], check=True, capture_output=True, text=True).stdout.strip())
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, *wheels], check=True)
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(others))
    return folder / "bin"


def start(environment: Path, folder: Path, *command: str | Path) -> str:
    """Run a program of the environment in a folder; its output."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "PATH": f"{environment}:{env['PATH']}"}
    name, *arguments = map(str, command)
    done = subprocess.run([environment / name, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_holds_what_a_checkout_has(wheels):
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    folder = Path(detector.__file__).parent
    files = {path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    files |= {folder / "configs" / path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.yaml")}
    assert names == {str(path.relative_to(folder.parent)) for path in files}
    assert "detector/configs/hydra/launcher/slurm.yaml" in names and "detector/explorer/page.js" in names


@pytest.mark.slow
def test_a_project_of_its_own(environment, tmp_path):
    """The example, step by step as its README has it, in a folder of its own and from the wheel."""
    shutil.copytree(EXAMPLE / "configs", tmp_path / "configs")
    shown = start(environment, tmp_path, "detector", "--help")
    assert all(f"    {name} " in shown for name in COMMANDS)
    start(environment, tmp_path, "python", "-P", ROOT / "tests" / "own_project.py")
    report = json.loads((tmp_path / "comparison" / "report.json").read_text())
    own = "ShiftedRoIAlign(gamma=0.1, sampling_ratio=2)"
    assert sorted(report["cost"]) == sorted(report["alignment"]) == [own, "align"]
    assert list(report["offsets"]) == [own]
    assert (tmp_path / "explorer.html").is_file()
