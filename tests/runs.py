"""A run that takes seconds: the real program on the tiny shapes data set, with a model of 0.1 M parameters."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from detector.commands.make_shapes import make_shapes
from detector.config import CONFIGS, check
from detector.engine.train import train
from tests.data.coco_files import five_points
from tests.tiny import OVERRIDES

ROOT = CONFIGS.parent
TINY = [
    *OVERRIDES,
    "schedule=cosine",
    "model.rpn.pre_nms_top_n=[200,200]",
    "model.rpn.post_nms_top_n=[60,60]",
    "model.box_head.batch_size_per_image=32",
    "schedule.max_epochs=null",
    "schedule.max_iterations=8",
    "schedule.warmup=2",
    "training.batch_size=4",
    "training.reference_batch=null",
    "evaluation.batch_size=4",
    "runtime.device=cpu",
    "runtime.threads=1",
    "runtime.workers=0",
    "runtime.log_every=1",
    "runtime.tensorboard=false",
]
KEYPOINTS = [text for text in TINY if "mask_head" not in text] + [
    "model=keypoint_rcnn",
    "model.keypoint_head.trunk.conv_channels=[16]",
    "data=custom",
    "data.masks=false",
    "data.keypoints=true",
]


def checked(*overrides: str):
    """The configuration of train.py with these overrides."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = hydra.compose("train", list(overrides))
    check(cfg)
    return cfg


def make_tiny_shapes(out: Path) -> Path:
    """The shapes data set in small: 24 train and 8 val images of 96 x 96 px."""
    make_shapes(out, train=24, val=8, size=96, seed=1)
    return out


@pytest.fixture
def config(shapes_tiny, tmp_path):
    """config(*overrides) -> the checked configuration of a tiny run in tmp_path/run."""
    return lambda *overrides: checked(*TINY, f"data.root={shapes_tiny}", f"run_dir={tmp_path / 'run'}", *overrides)


@pytest.fixture(scope="session")
def five(tmp_path_factory) -> Path:
    """A tiny data set whose objects have five keypoints."""
    return five_points(tmp_path_factory.mktemp("five_points"))


@pytest.fixture
def points(tmp_path):
    """points(root, *overrides): train a tiny keypoint model in tmp_path/run; returns the configuration."""

    def go(root: Path, *overrides: str):
        cfg = checked(*KEYPOINTS, f"data.root={root}", f"run_dir={tmp_path / 'run'}", *overrides)
        train(cfg)
        return cfg

    return go


@pytest.fixture
def run(config):
    """run(*overrides): train in this process; returns the run's folder."""

    def go(*overrides: str) -> Path:
        cfg = config(*overrides)
        train(cfg)
        return Path(cfg.run_dir)

    return go


def forks():
    """Processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["detector.engine.train", "detector.roi", "albumentations"])
    return context


def rank_of(variables: dict[str, str], cfg) -> None:
    os.environ.update(variables)
    train(cfg)


class TwoRanks:
    """A run of two ranks, begun."""

    def __init__(self, cfg):
        self.folder = Path(cfg.run_dir)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        ranks = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        self.processes = [forks().Process(target=rank_of, args=(variables, cfg)) for variables in ranks]
        for process in self.processes:
            process.start()

    def end(self) -> list[int]:
        """The exit codes."""
        for process in self.processes:
            process.join(120)
        return [process.exitcode for process in self.processes]


@pytest.fixture
def two_ranks(config):
    """two_ranks(*overrides) -> TwoRanks; killed at the end of the test at the latest."""
    started: list[TwoRanks] = []

    def start(*overrides: str) -> TwoRanks:
        started.append(TwoRanks(config(*overrides)))
        return started[-1]

    yield start
    for process in (process for run in started for process in run.processes):
        process.kill()


class Program:
    """`python train.py` on the tiny run, in a process of its own."""

    def __init__(self, arguments: list[str], ranks: int = 1, folder: Path = ROOT, restarts: int = 0):
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--master-port=0", "--standalone"]
            launcher += [f"--max-restarts={restarts}"]
        self.process = subprocess.Popen(
            [*launcher, str(ROOT / "train.py"), *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.output = ""

    def wait_for(self, text: str) -> None:
        """Read the output up to a line that contains `text`."""
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"{text!r} never appeared in:\n{self.output}")

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.end()

    def end(self) -> int:
        """The exit code; `output` is complete then."""
        self.output += self.process.communicate(timeout=120)[0]
        return self.process.returncode


@pytest.fixture
def program(shapes_tiny, tmp_path):
    """program(*overrides, ranks=1) -> a started Program; killed at the end of the test at the latest."""
    started: list[Program] = []

    def start(*overrides: str, **options) -> Program:
        arguments = [*TINY, f"data.root={shapes_tiny}", f"run_dir={tmp_path / 'run'}", *overrides]
        started.append(Program(arguments, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:  # SIGTERM: torchrun ends its ranks only if it is asked
            one.process.send_signal(signal.SIGTERM)
            one.process.communicate(timeout=60)


def curve(folder: Path) -> dict[int, dict[str, float]]:
    """iteration -> its losses, from log.jsonl."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keys = ("grad_norm", "lr")
    return {
        line["iteration"]: {k: v for k, v in line.items() if k.startswith("loss") or k in keys}
        for line in lines
        if "metrics" not in line
    }
