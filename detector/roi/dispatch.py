"""Which code computes a RoI method: one function decides; a context manager or an environment variable overrides it.

Paths:
- "triton": kernels on the GPU, all levels in one launch (triton_align.py, triton_bag.py).
- "bag": the weighted bag of cells in pure PyTorch (bag.py): every device, every dtype, every gradient.
- "torchvision": torchvision's compiled op, one call per level; only for what it implements.
- "plain": operators that torch.export and ONNX know, with shapes that do not depend on the data (plain.py).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from subprocess import CalledProcessError

import torch
from torch import Tensor

log = logging.getLogger(__name__)
PATHS = ("triton", "bag", "torchvision", "plain")
_forced: str | None = None


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
            "Triton's kernels cannot be used, RoI methods take slower paths: %s. Triton needs a C compiler and "
            "Python's header files (Debian and Ubuntu: apt-get install gcc python3-dev)",
            error,
        )
        return False
    return True


def choose_path(features: Tensor, paths: Sequence[str] = PATHS) -> str:
    """The path that computes a RoI method over `features` (of any level), out of the `paths` that the method has.

    On the GPU "triton" where it can run, else "torchvision", else "bag". On the CPU "bag", the fastest there. float64,
    which is for gradient checks, is the bag's everywhere. While a program is exported, "plain". `use_path` or the
    environment variable ROI_PATH force a path on the methods that have it.

    Raises ValueError if the forced path is unknown.
    """
    forced = "plain" if exporting() else _forced or os.environ.get("ROI_PATH")
    if forced and forced not in PATHS:
        raise ValueError(f"the environment variable ROI_PATH must be one of {PATHS}, got {forced!r}")
    if forced in paths:
        return forced
    if features.is_cuda and features.dtype != torch.float64:
        order = ("triton", "torchvision", "bag") if triton_available() else ("torchvision", "bag")
    else:
        order = ("bag", "torchvision")
    return next(path for path in order if path in paths)


def exporting() -> bool:
    """Whether shapes must not depend on the data: torch.export runs, or the path "plain" is forced."""
    return torch.compiler.is_exporting() or (_forced or os.environ.get("ROI_PATH")) == "plain"


def check_fixed(what: str) -> None:
    """ValueError while exporting: `what` depends on the data."""
    if exporting():
        raise ValueError(f"{what}, and the shapes of an exported program do not: it needs another form in plain.py")


@contextmanager
def use_path(path: str) -> Iterator[None]:
    """Force `path` on every method that has it: `with use_path("bag"): ...`.

    Raises ValueError if `path` is unknown.
    """
    global _forced
    if path not in PATHS:
        raise ValueError(f"path must be one of {PATHS}, got {path!r}")
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before
