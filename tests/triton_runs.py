"""Triton's kernels on a machine without a GPU: run by its interpreter, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def run_under_the_interpreter(cases: Path) -> None:
    """Run a file of tests in a process of its own, for Triton reads the variable when it is imported."""
    triton = pytest.importorskip("triton", reason="this platform has no Triton")
    if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", str(cases)]
    run = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


def compile_for_hopper(kernel, arguments: dict, num_warps: int = 4) -> str:
    """PTX of a kernel for given argument types, with pointers and channels known to be multiples of 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[name]
        if value is None or name.isupper():
            types[name], constants[(i,)] = "constexpr", value
            continue
        types[name] = value
        for at, part in [((i, j), v) for j, v in enumerate(value)] if isinstance(value, tuple) else [((i,), value)]:
            if part.startswith("*") or name == "channels":
                attributes[at] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}).asm["ptx"]
