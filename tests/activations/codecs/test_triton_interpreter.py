"""Runs the kernels' tests in Triton's interpreter, and compiles the kernels without a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")


@pytest.mark.slow
def test_kernels_equal_torch_in_the_interpreter() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "test_triton_kernels.py"],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)
    assert "skipped" not in result.stdout


POINTERS = {
    "x_ptr": "*bf16",
    "noise_ptr": "*i16",
    "codes_ptr": "*u8",
    "steps_ptr": "*bf16",
    "out_ptr": "*bf16",
    "high_ptr": "*u8",
    "thresholds_ptr": "*i32",
    "cells_ptr": "*i32",
    "inverse_ptr": "*fp32",
    "levels_ptr": "*bf16",
    "rms_ptr": "*fp32",
    "numel": "i32",
    "stored_bytes": "i32",
    "high_bytes": "i32",
    "groups": "i32",
    "reciprocal": "fp32",
    "tiny_peak": "fp32",
}


def _ptx(kernel: Any, constants: dict[str, Any]) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    aligned = [
        i for i, n in enumerate(names) if n.endswith("_ptr") or n in ("numel", "stored_bytes", "high_bytes")
    ]
    source = ASTSource(
        fn=kernel,
        signature={n: POINTERS.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm[
        "ptx"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "high_bits"), [(2, 0), (4, 2), (8, 0)])
def test_absmax_compiles_for_hopper_in_wide_loads_without_fused_arithmetic(bits: int, high_bits: int) -> None:
    from slimfit_ds.activations.codecs import triton_absmax

    encode = {
        "GROUP": 32,
        "BLOCK": 32,
        "ROWS": 128,
        "BITS": bits,
        "HIGH_BITS": high_bits,
        "WHOLE": 1,
        "FRACTION": 0.5,
        "LOW": 0,
        "HIGH": 3,
    }
    ptx = _ptx(triton_absmax._encode_kernel, {**encode, "STOCHASTIC": True})
    assert "ld.global.v4" in ptx
    assert "fma." not in ptx
    ptx = _ptx(
        triton_absmax._decode_kernel,
        {"ZERO": 1.5, "GROUP": 32, "BLOCK": 32, "ROWS": 128, "BITS": bits, "HIGH_BITS": high_bits},
    )
    assert "st.global.v4" in ptx
    assert "fma." not in ptx


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "high_bits"), [(1, 0), (2, 0), (4, 0), (4, 1)])
def test_tables_compile_for_hopper_in_wide_loads(bits: int, high_bits: int) -> None:
    from slimfit_ds.activations.codecs import triton_table

    shape = {"SCALED": True, "BITS": bits, "HIGH_BITS": high_bits, "TILE": 4096}
    search = {"STEPS": bits + high_bits - 1, "SHARED_CELLS": True, "SIGN": 1}
    assert "ld.global.v4" in _ptx(triton_table._encode_kernel, {**shape, **search})
    assert "st.global.v4" in _ptx(triton_table._decode_kernel, shape)
