"""Messages on the screen, and the memory that a line tells."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import torch
from tqdm import tqdm

from detector.engine.journal import Screen, memory_mb


def test_messages_stand_above_the_progress_bar():
    terminal = io.StringIO()
    handler = Screen(terminal)
    handler.setFormatter(logging.Formatter("%(message)s"))
    with tqdm(total=3, file=terminal, ncols=40) as bar:
        bar.update()
        handler.emit(logging.makeLogRecord({"msg": "a message"}))
        bar.update()
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert "a message" in lines and lines[-2].lstrip().startswith("67%")


def test_a_system_that_keeps_no_peak_ends_no_run(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name:\tpython\nVmRSS:\t  1024 kB\n")
    assert memory_mb(torch.device("cpu")) > 1
