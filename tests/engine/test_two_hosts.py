"""Two network namespaces as two hosts; one dies with all its processes and comes back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.runs import ROOT, TINY

PORT = 29511


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts():
    """Names of two namespaces with 10.77.0.1 and 10.77.0.2, joined by a cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and `ip` to make network namespaces")
    names = [f"host{i}-{os.getpid()}" for i in (1, 2)]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine makes no network namespaces: {error.stderr.strip()}")
    ip("netns", "add", names[1])
    ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
    for i, name in enumerate(names, 1):
        ip("-n", name, "addr", "add", f"10.77.0.{i}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", name, "link", "set", device, "up")
    yield names
    for name in names:
        kill_all(name)
        ip("netns", "del", name)


def kill_all(name: str) -> None:
    """What a power cut does to a host."""
    for pid in ip("netns", "pids", name).split():
        os.kill(int(pid), signal.SIGKILL)


def start(name: str, number: int, arguments: list[str], log: Path) -> subprocess.Popen:
    """torchrun with one rank on the host, as docs/scale.md has it."""
    launcher = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
    launcher += ["--nproc-per-node=1", "--max-restarts=3", f"--local-addr=10.77.0.{number}", "--rdzv-id=run"]
    launcher += ["--rdzv-backend=c10d", f"--rdzv-endpoint=10.77.0.1:{PORT}", f"--rdzv-conf=is_host={int(number == 1)}"]
    variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with log.open("a") as output:
        command = [*launcher, str(ROOT / "train.py"), *arguments]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **variables})


def wait_for_iteration(folder: Path, iteration: int, processes: list[subprocess.Popen], limit: float = 180) -> None:
    end = time.monotonic() + limit
    while time.monotonic() < end and all(process.poll() is None for process in processes):
        if (folder / "log.jsonl").exists() and f'"iteration": {iteration},' in (folder / "log.jsonl").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"iteration {iteration} was never reached")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_host_dies_and_comes_back(hosts, two_ranks, shapes_tiny, tmp_path):
    settings = ["schedule.max_iterations=24", "runtime.checkpoint_every=4"]
    undisturbed = two_ranks(*settings, f"run_dir={tmp_path / 'undisturbed'}")  # on one host
    folder, log = tmp_path / "run", tmp_path / "output.log"
    arguments = [*TINY, f"data.root={shapes_tiny}", f"run_dir={folder}", *settings]
    processes = [start(name, number, arguments, log) for number, name in enumerate(hosts, 1)]
    try:
        wait_for_iteration(folder, 10, processes)
        kill_all(hosts[1])
        processes[1].wait(timeout=30)
        processes[1] = start(hosts[1], 2, arguments, log)
        assert [process.wait(timeout=180) for process in processes] == [0, 0]
    except (AssertionError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"{error}\n{log.read_text()[-5000:]}") from None
    assert undisturbed.end() == [0, 0]
    assert "continuing in" in log.read_text(), "the second attempt started anew"
    found, wanted = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("run", "undisturbed"))
    assert found["iteration"] == wanted["iteration"] == 24
    for name, weight in wanted["model"].items():
        assert torch.equal(found["model"][name], weight), name
