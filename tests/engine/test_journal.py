"""Messages on the screen."""

from __future__ import annotations

import io
import logging

from tqdm import tqdm

from detector.engine.journal import Screen


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
