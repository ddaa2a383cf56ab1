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


INTERPRETED = {
    "codecs": (
        "test_triton_kernels.py",
        "test_triton_fixed_and_masks.py",
        "test_triton_channels.py",
        "test_triton_pruning.py",
        "test_triton_several.py",
    ),
    "functions": ("test_triton_norm.py", "test_triton_activation.py", "test_triton_dropout.py"),
    "launches": ("test_launches.py",),
}


@pytest.mark.slow
@pytest.mark.parametrize("files", INTERPRETED)
def test_kernels_equal_torch_in_the_interpreter(files: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *INTERPRETED[files]],
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
    "y_ptr": "*bf16",
    "dy_ptr": "*bf16",
    "dx_ptr": "*bf16",
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
    "rstd_ptr": "*fp32",
    "partial_ptr": "*fp32",
    "tokens": "i32",
    "programs": "i32",
    "eps": "fp32",
    "seed": "u64",
    "first": "i64",
    "threshold": "i64",
    "scale": "fp32",
    "reciprocal": "fp32",
    "tiny_peak": "fp32",
    "scale_ptr": "*fp32",
    "offset_ptr": "*fp32",
    "head_stride": "i32",
    "bytes_ptr": "*u8",
    "keys_ptr": "*i16",
    "kth_ptr": "*i16",
    "above_ptr": "*i64",
    "equal_ptr": "*i64",
    "missing_ptr": "*i64",
    "values_ptr": "*bf16",
    "index_ptr": "*i32",
    "count": "i32",
}
# Launched with 1, a number becomes a constant.
NO_CHANNELS = {"head_stride": 1, "width_stride": 1, "HEADS": 1, "WIDTH": 0}
CHANNELS = {"width_stride": 1, "HEADS": 12, "WIDTH": 64}


def _ptx(kernel: Any, constants: dict[str, Any]) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    # Kernels for several tensors number what they have of each.
    kinds = [re.sub(r"\d", "", name) for name in names]
    aligned = [
        i for i, n in enumerate(kinds) if n.endswith("_ptr") or n in ("numel", "stored_bytes", "high_bytes")
    ]
    source = ASTSource(
        fn=kernel,
        signature={
            n: "constexpr" if n in constants else POINTERS[kind] for n, kind in zip(names, kinds, strict=True)
        },
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
        **NO_CHANNELS,
    }
    ptx = _ptx(triton_absmax.encode_kernel, {**encode, "STOCHASTIC": True})
    assert "ld.global.v4" in ptx
    assert "fma." not in ptx
    ptx = _ptx(
        triton_absmax.decode_kernel,
        {
            "ZERO": 1.5,
            "GROUP": 32,
            "BLOCK": 32,
            "ROWS": 128,
            "BITS": bits,
            "HIGH_BITS": high_bits,
            **NO_CHANNELS,
        },
    )
    assert "st.global.v4" in ptx
    assert "fma." not in ptx


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "high_bits"), [(1, 0), (2, 0), (4, 0), (4, 1)])
def test_tables_compile_for_hopper_in_wide_loads(bits: int, high_bits: int) -> None:
    from slimfit_ds.activations.codecs import triton_table

    shape = {"SCALED": True, "BITS": bits, "HIGH_BITS": high_bits, "TILE": 4096, **NO_CHANNELS}
    search = {"STEPS": bits + high_bits - 1, "SHARED_CELLS": True, "SIGN": 1}
    assert "ld.global.v4" in _ptx(triton_table._encode_kernel, {**shape, **search})
    assert "st.global.v4" in _ptx(triton_table._decode_kernel, shape)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_fixed_point_compiles_for_hopper_in_wide_loads_without_fused_arithmetic(bits: int) -> None:
    from slimfit_ds.activations.codecs import triton_fixed_point

    shape = {"BITS": bits, "TILE": 4096, "LOW": -8}
    ptx = _ptx(triton_fixed_point._encode_kernel, {**shape, "SCALE": 2.0, "HIGH": 7})
    assert "ld.global.v4" in ptx
    assert "fma." not in ptx
    assert "st.global.v4" in _ptx(triton_fixed_point._decode_kernel, {**shape, "STEP": 0.5})


@pytest.mark.slow
def test_masks_compile_for_hopper_in_wide_loads() -> None:
    from slimfit_ds.activations.codecs import triton_mask

    assert "ld.global.v4" in _ptx(triton_mask._encode_kernel, {"TILE": 8192})
    assert "st.global.v4" in _ptx(triton_mask._decode_kernel, {"TILE": 8192})


@pytest.mark.slow
def test_pruning_compiles_for_hopper_in_wide_loads() -> None:
    from slimfit_ds.activations.codecs import triton_pruning

    shape = {"LOW": 0x7FFF, "TILE": 1024}
    assert "ld.global.v4" in _ptx(triton_pruning._count_kernel, shape)
    assert "ld.global.v4" in _ptx(triton_pruning._select_kernel, shape)
    assert "st.global" in _ptx(triton_pruning._restore_kernel, {"TILE": 1024})


@pytest.mark.slow
def test_channels_compile_for_hopper_in_wide_loads() -> None:
    from slimfit_ds.activations.codecs import triton_absmax, triton_table

    absmax = {"GROUP": 64, "BLOCK": 64, "ROWS": 64, "BITS": 8, "HIGH_BITS": 0, **CHANNELS}
    integers = {"WHOLE": 0, "FRACTION": 0.0, "LOW": -127, "HIGH": 127, "STOCHASTIC": False}
    table = {"SCALED": False, "BITS": 4, "HIGH_BITS": 0, "TILE": 4096, **CHANNELS}
    search = {"STEPS": 3, "SHARED_CELLS": False, "SIGN": 8}
    for kernel, constants in (
        (triton_absmax.encode_kernel, {**absmax, **integers}),
        (triton_table._encode_kernel, {**table, **search}),
    ):
        ptx = _ptx(kernel, constants)
        assert "ld.global.v4" in ptx
        assert "fma.rn.f32" in ptx
    for kernel, constants in (
        (triton_absmax.decode_kernel, {**absmax, "ZERO": 0.0}),
        (triton_table._decode_kernel, table),
    ):
        ptx = _ptx(kernel, constants)
        assert "st.global.v4" in ptx
        assert "fma.rn.f32" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "quick_gelu", "relu"])
def test_activations_compile_for_hopper_in_wide_loads(name: str) -> None:
    from slimfit_ds.activations.ops import triton_activation
    from slimfit_ds.activations.ops.triton_elementwise import FORMS, SLOPES

    cells = {"BITS": 4, "HIGH_BITS": 1, "TILE": 4096}
    groups = {"GROUP": 64, "ROWS": 64, "BITS": 4, "HIGH_BITS": 0}
    kernels = [
        (triton_activation._table_gradient_kernel, cells),
        (triton_activation._integer_gradient_kernel, {**groups, "SLOPE": SLOPES[name], "ZERO": 7}),
    ]
    for form in FORMS[name]:
        search = {"STEPS": 4, "SHARED_CELLS": True, "SIGN": 16, "FUNCTION": form}
        kernels.append((triton_activation._table_forward_kernel, {**cells, **search}))
        kernels.append((triton_activation._integer_forward_kernel, {**groups, "WHOLE": 7, "FUNCTION": form}))
    for kernel, constants in kernels:
        ptx = _ptx(kernel, constants)
        assert "ld.global.v4" in ptx
        assert "st.global.v4" in ptx


@pytest.mark.slow
def test_dropout_compiles_for_hopper_in_wide_loads() -> None:
    from slimfit_ds.activations.ops import triton_dropout

    ptx = _ptx(triton_dropout._drop_kernel, {"TILE": 1024})
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx


@pytest.mark.slow
@pytest.mark.parametrize("width", [768, 4096])
def test_norms_compile_for_hopper_in_wide_loads(width: int) -> None:
    from slimfit_ds.activations.ops import triton_norm, triton_norm_weights

    groups = {
        "WIDTH": width,
        "GROUP": 64,
        "GROUPS": 4096 // 64 if width > 1024 else 16,
        "BITS": 4,
        "HIGH_BITS": 2,
    }
    back = {**groups, "ZERO": 31.0, "OFFSET": 0.0, "CENTRED": True, "SCALED": True}
    wanted = {"TO_INPUT": True, "TO_SCALE": True, "TO_BIAS": True}
    for kernel, constants in (
        (triton_norm._encode_kernel, {**groups, "CENTRED": True, "WHOLE": 31}),
        (triton_norm._gradient_kernel, back),
        (triton_norm_weights._gradients_kernel, {**back, **wanted}),
    ):
        assert "ld.global.v4" in _ptx(kernel, constants)


@pytest.mark.slow
def test_several_tensors_compile_for_hopper_in_wide_loads_without_fused_arithmetic() -> None:
    from slimfit_ds.activations.codecs import triton_several

    groups = {"GROUP": 128, "BLOCK": 128, "ROWS": 32, "BITS": 4, "HIGH_BITS": 2}
    ptx = _ptx(triton_several._encode_kernel, {**groups, "WHOLE": 31, "FRACTION": 0.0})
    assert "ld.global.v4" in ptx
    assert "fma." not in ptx
    assert "st.global.v4" in _ptx(triton_several._decode_kernel, {**groups, "ZERO": 31.0})
