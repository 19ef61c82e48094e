"""Whether Triton's kernels for GPUs can run here, and how they are launched."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError

import torch

log = logging.getLogger(__name__)


@torch.compiler.assume_constant_result
@cache
def triton_available() -> bool:
    """Whether this machine has Triton, a GPU that it compiles for, and what Triton builds its launcher with."""
    if find_spec("triton") is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (7, 0):
        return False
    from triton.runtime import driver

    try:
        _ = driver.active.utils  # built at its first use
    except (RuntimeError, OSError, CalledProcessError) as error:
        log.warning(
            "Triton's kernels cannot be used, slower paths are taken: %s. Triton needs a C compiler and "
            "Python's header files (Debian and Ubuntu: apt-get install gcc python3-dev)",
            error,
        )
        return False
    return True
