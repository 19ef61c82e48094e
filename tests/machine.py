"""What rounding depends on, for tests against recorded numbers."""

from __future__ import annotations

import contextlib
import platform
import re
from pathlib import Path

import torch
import torchvision


def machine() -> dict[str, str]:
    """The processor and the libraries: where they are the same, so are the sums, to the bit."""
    processor = platform.processor()
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        cpu = dict(re.findall(r"^(.+?)\s*: (.+)$", first, re.MULTILINE))
        processor = " ".join(cpu.get(key, "?") for key in ("vendor_id", "model name", "cpu family", "model"))
    return {
        "processor": processor,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
    }
