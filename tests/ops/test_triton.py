"""The kernels of ops without a GPU: run by Triton's interpreter, and compiled for one. tests/gpu runs them on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.triton_runs import compile_for_hopper, run_under_the_interpreter


@pytest.mark.slow
def test_kernels_compute_what_they_must_under_the_interpreter():
    run_under_the_interpreter(Path(__file__).with_name("triton_cases.py"))


@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
@pytest.mark.parametrize("shortcut", [False, True])
def test_finish_compiles_with_16_byte_accesses(dtype, shortcut):
    pytest.importorskip("triton", reason="this platform has no Triton")
    from detector.ops.triton_finish import _finish

    arguments = {
        "x": dtype,
        "bias": "*fp32",
        "shortcut": dtype if shortcut else None,
        "cells": "i32",
        "channels": "i32",
    }
    ptx = compile_for_hopper(_finish, arguments | {"RELU": True, "ROWS": 16, "CHANNELS": 256}, num_warps=8)
    assert ptx.count("ld.global.v4.b32") >= 1 + shortcut and "st.global.v4.b32" in ptx


def test_suppress_compiles():
    pytest.importorskip("triton", reason="this platform has no Triton")
    from detector.ops.triton_nms import BLOCK, _suppress

    types = {"boxes": "*fp32", "key": "*i64", "ends": "*i64", "keep": "*i8", "dropped": "i64", "threshold": "fp32"}
    ptx = compile_for_hopper(_suppress, types | {"BLOCK": BLOCK}, num_warps=8)
    assert ("div.rn.f32" in ptx and "fma.rn.f32" in ptx) or "div.rn.f32" in ptx
