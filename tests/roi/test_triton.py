"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for one. tests/gpu runs them on one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detector.roi.base import choose_path, triton_available, use_path

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_compute_their_equations_under_the_interpreter():
    triton = pytest.importorskip("triton", reason="this platform has no Triton")
    if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not run with NumPy {np.__version__}")
    # Triton reads the variable when it is imported, so the cases need a process of their own.
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", str(CASES)]
    run = subprocess.run(command, env=environment, cwd=CASES.parents[2], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


COMMON = {
    "heights": ("fp32",) * 4, "widths": ("fp32",) * 4, "scales": ("fp32",) * 4, "rois": "*fp32", "levels": "*i64",
    "images": "i32", "channels": "i32", "bins_h": "i32", "bins_w": "i32", "gamma": "fp32",
}  # fmt: skip
CONSTANTS = {"SAMPLES": 2, "ALIGNED": True, "ROWS": 4, "CHANNELS": 256}
PLAIN = {"offsets": None, "modulation": None}
DEFORMABLE = {"offsets": "*fp32", "modulation": "*fp32"}


def kernel_arguments(name: str, dtype: str) -> dict:
    forward = {"features": (dtype,) * 4, "out": dtype}
    backward = {"grad": dtype, "sums": "*fp32", "unit": None, "FIXED_POINT": False}
    return {
        "align": ("_forward", {**forward, **PLAIN}),
        "adaptive": ("_forward", {**forward, **PLAIN, "SAMPLES": 0}),
        "deformable": ("_forward", {**forward, **DEFORMABLE}),
        "align gradient": ("_features_gradient", {**backward, **PLAIN}),
        "fixed point": (
            "_features_gradient",
            {**backward, **DEFORMABLE, "sums": "*i64", "unit": "*fp32", "FIXED_POINT": True},
        ),
        "offsets gradient": (
            "_offsets_gradient",
            {
                "grad": dtype,
                "features": (dtype,) * 4,
                "offsets_grad": "*fp32",
                "modulation_grad": "*fp32",
                **DEFORMABLE,
            },
        ),
    }[name]


def compile_for_hopper(kernel, arguments: dict) -> str:
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
    return compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]


@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
@pytest.mark.parametrize(
    "name", ["align", "adaptive", "deformable", "align gradient", "fixed point", "offsets gradient"]
)
def test_kernels_compile_with_16_byte_accesses(name, dtype):
    pytest.importorskip("triton", reason="this platform has no Triton")
    from detector.roi import triton_align

    kernel, arguments = kernel_arguments(name, dtype)
    ptx = compile_for_hopper(getattr(triton_align, kernel), {**COMMON, **CONSTANTS, **arguments})
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
    if name == "align gradient":
        assert re.search(r"(atom|red)\.global\S*\.v4\.f32", ptx)
    if kernel == "_forward":
        assert re.search(r"st\.global\S*\.v4\.b32", ptx)


# --- the choice of path ---


def test_the_cpu_takes_the_bag_and_float64_always_does():
    maps = torch.zeros(1, 4, 2, 2)
    assert choose_path(maps) == "bag"
    assert choose_path(maps, ("triton", "torchvision")) == "torchvision"
    assert choose_path(maps.double()) == "bag"


def test_a_path_is_forced_where_a_method_has_it(monkeypatch):
    maps = torch.zeros(1, 4, 2, 2)
    with use_path("torchvision"):
        assert choose_path(maps) == "torchvision"
        assert choose_path(maps, ("triton", "bag")) == "bag"
        with use_path("bag"):
            assert choose_path(maps) == "bag"
        assert choose_path(maps) == "torchvision"
    assert choose_path(maps) == "bag"
    monkeypatch.setenv("ROI_PATH", "torchvision")
    assert choose_path(maps) == "torchvision"
    with use_path("bag"):  # the nearer one wins
        assert choose_path(maps) == "bag"


@pytest.mark.parametrize("compiler", ["gcc", None])
def test_without_a_c_compiler_other_paths_serve(monkeypatch, caplog, compiler):
    """Triton builds a launcher in C at its first use; here on a machine that is said to have a GPU."""
    runtime = pytest.importorskip("triton.runtime", reason="this platform has no Triton")

    class Driver:
        @property
        def active(self):
            if compiler is None:
                raise RuntimeError("Failed to find C compiler")
            return SimpleNamespace(utils="built")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(runtime, "driver", Driver())
    triton_available.cache_clear()
    try:
        assert triton_available() == (compiler is not None)
    finally:
        triton_available.cache_clear()
    assert ("Failed to find C compiler. Triton needs a C compiler" in caplog.text) == (compiler is None)


def test_an_unknown_path_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"path must be one of .* got 'fast'"), use_path("fast"):
        pass
    monkeypatch.setenv("ROI_PATH", "fast")
    with pytest.raises(ValueError, match=r"ROI_PATH must be one of .* got 'fast'"):
        choose_path(torch.zeros(1))
