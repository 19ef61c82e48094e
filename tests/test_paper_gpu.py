"""Without a GPU: no program mixes what lies on one with what does not. tests/gpu runs on a real one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_nothing_mixes_devices():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.paper_gpu", "tests/paper_gpu_cases.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
