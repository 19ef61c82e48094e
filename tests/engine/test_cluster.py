"""A grid through submitit, as on a SLURM cluster; here its jobs are processes of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import hydra
import pytest

from detector.config import CONFIGS
from tests.runs import ROOT, TINY

pytest.importorskip("hydra_plugins.hydra_submitit_launcher")


def test_slurm_launcher_composes():
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        overrides = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
        launcher = hydra.compose("train", overrides, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert (launcher.partition, launcher.gpus_per_node, launcher.max_num_timeout) == ("gpu", 1, 10)


@pytest.mark.slow
def test_jobs_of_a_grid_are_processes_of_their_own(shapes_tiny, tmp_path):
    settings = [*TINY, f"data.root={shapes_tiny}", "schedule.max_iterations=4", f"hydra.sweep.dir={tmp_path / 'jobs'}"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=submitit_local", *settings]
    command += [f"run_dir={tmp_path}/seed=${{seed}}", "seed=-1,0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 jobs: 1 done, 1 failed" in done.stdout and "Traceback" not in done.stderr
    jobs = json.loads((tmp_path / "multirun.json").read_text())
    assert [job["state"] for job in jobs] == ["failed", "done"]
    assert jobs[0]["reason"] == "seed = -1: must be at least 0" and 0 <= jobs[1]["value"] <= 1
    assert (tmp_path / "seed=0" / "metrics.json").exists()
