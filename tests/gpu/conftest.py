"""What the tests on a GPU share: float32 as exact as the CPU's, and failures that are told when they happen."""

from __future__ import annotations

import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def exact_convolutions():
    """Without tf32, which rounds to 10 bits and which cuDNN takes by default."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def pytest_runtest_logreport(report) -> None:
    """Time on a GPU is short: a check that is cut off has said by then what failed."""
    if report.failed:
        print(f"\nFAILED {report.nodeid}\n{report.longreprtext[-1500:]}", file=sys.stderr, flush=True)
    elif report.when == "call" and report.duration > 20:
        print(f"\n{report.nodeid} took {report.duration:.0f} s", file=sys.stderr, flush=True)
