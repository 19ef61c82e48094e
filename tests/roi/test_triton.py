"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for one. tests/gpu runs them on one."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from detector.ops.kernels import triton_available
from detector.roi.base import choose_path, use_path
from tests.triton_runs import compile_for_hopper, run_under_the_interpreter

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_compute_their_equations_under_the_interpreter():
    run_under_the_interpreter(CASES)


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
