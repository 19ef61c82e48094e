"""How many CPU threads a program has."""

from __future__ import annotations

import os

import pytest
import torch

from detector.runtime import start_ranks
from detector.settings import Runtime
from detector.threads import cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_cores_of_a_container(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores(tmp_path) == (expected or 64)


def test_no_more_threads_than_cores(monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr("detector.runtime.cores", lambda: 3)
        start_ranks(Runtime(device="cpu"))
        assert torch.get_num_threads() == 3
        start_ranks(Runtime(device="cpu", threads=5))
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
