"""Absmax integers of two or three tensors in one launch: queries, keys and values.

The second number of a program tells which tensor it works on, the first which part of it, as in `triton_absmax`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.packing import low_and_high
from slimfit_ds.activations.codecs.triton_absmax import TILE, decode_kernel, encode_kernel

if TYPE_CHECKING:
    from slimfit_ds.activations.codecs.absmax import IntegerGrid

__all__ = ["SEVERAL", "decode_several", "encode_several"]

SEVERAL = 3
"""The most tensors of a launch."""


@triton.jit
def _encode_one(
    x_ptr,
    codes_ptr,
    high_ptr,
    steps_ptr,
    numel,
    stored_bytes,
    high_bytes,
    groups,
    reciprocal,
    tiny_peak,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
):
    # Rounded to nearest, without channels: noise, scale and offset are not read.
    encode_kernel(
        x_ptr, x_ptr, codes_ptr, high_ptr, steps_ptr, numel, stored_bytes, high_bytes, groups,
        reciprocal, tiny_peak, steps_ptr, steps_ptr, 1, 1, GROUP, BLOCK, ROWS, BITS, HIGH_BITS, WHOLE, FRACTION,
        0, 0, False, 1, 0,
    )  # fmt: skip


@triton.jit
def _encode_kernel(
    x0_ptr, codes0_ptr, high0_ptr, steps0_ptr, numel0, stored_bytes0, high_bytes0, groups0,
    x1_ptr, codes1_ptr, high1_ptr, steps1_ptr, numel1, stored_bytes1, high_bytes1, groups1,
    x2_ptr, codes2_ptr, high2_ptr, steps2_ptr, numel2, stored_bytes2, high_bytes2, groups2,
    reciprocal,
    tiny_peak,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    FRACTION: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    if which == 0:
        _encode_one(
            x0_ptr, codes0_ptr, high0_ptr, steps0_ptr, numel0, stored_bytes0, high_bytes0, groups0,
            reciprocal, tiny_peak, GROUP, BLOCK, ROWS, BITS, HIGH_BITS, WHOLE, FRACTION,
        )  # fmt: skip
    elif which == 1:
        _encode_one(
            x1_ptr, codes1_ptr, high1_ptr, steps1_ptr, numel1, stored_bytes1, high_bytes1, groups1,
            reciprocal, tiny_peak, GROUP, BLOCK, ROWS, BITS, HIGH_BITS, WHOLE, FRACTION,
        )  # fmt: skip
    else:
        _encode_one(
            x2_ptr, codes2_ptr, high2_ptr, steps2_ptr, numel2, stored_bytes2, high_bytes2, groups2,
            reciprocal, tiny_peak, GROUP, BLOCK, ROWS, BITS, HIGH_BITS, WHOLE, FRACTION,
        )  # fmt: skip


@triton.jit
def _decode_one(
    codes_ptr,
    high_ptr,
    steps_ptr,
    out_ptr,
    numel,
    stored_bytes,
    high_bytes,
    groups,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
):
    decode_kernel(
        codes_ptr, high_ptr, steps_ptr, out_ptr, numel, stored_bytes, high_bytes, groups,
        steps_ptr, steps_ptr, 1, 1, ZERO, GROUP, BLOCK, ROWS, BITS, HIGH_BITS, 1, 0,
    )  # fmt: skip


@triton.jit
def _decode_kernel(
    out0_ptr, codes0_ptr, high0_ptr, steps0_ptr, numel0, stored_bytes0, high_bytes0, groups0,
    out1_ptr, codes1_ptr, high1_ptr, steps1_ptr, numel1, stored_bytes1, high_bytes1, groups1,
    out2_ptr, codes2_ptr, high2_ptr, steps2_ptr, numel2, stored_bytes2, high_bytes2, groups2,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH_BITS: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(1)
    if which == 0:
        _decode_one(
            codes0_ptr, high0_ptr, steps0_ptr, out0_ptr, numel0, stored_bytes0, high_bytes0, groups0,
            ZERO, GROUP, BLOCK, ROWS, BITS, HIGH_BITS,
        )  # fmt: skip
    elif which == 1:
        _decode_one(
            codes1_ptr, high1_ptr, steps1_ptr, out1_ptr, numel1, stored_bytes1, high_bytes1, groups1,
            ZERO, GROUP, BLOCK, ROWS, BITS, HIGH_BITS,
        )  # fmt: skip
    else:
        _decode_one(
            codes2_ptr, high2_ptr, steps2_ptr, out2_ptr, numel2, stored_bytes2, high_bytes2, groups2,
            ZERO, GROUP, BLOCK, ROWS, BITS, HIGH_BITS,
        )  # fmt: skip


def encode_several(jobs: Sequence[tuple[Tensor, tuple[Tensor, ...]]], grid: IntegerGrid, group: int) -> None:
    """Fill codes and steps of two or three tensors, rounding to nearest.

    Args:
        jobs: fp32, bf16 or fp16 [numel], and what is kept of it, as `AbsmaxCodec.storage` lays it out.
        grid: of the codes.
        group: elements per step.
    """
    from slimfit_ds.activations.codecs.absmax import TINY_PEAK

    whole, fraction = divmod(grid.zero, 1)
    _launch(
        _encode_kernel,
        [(flat, kept) for flat, kept in jobs],
        grid,
        group,
        (1.0 / grid.half_width, TINY_PEAK),
        {"WHOLE": int(whole), "FRACTION": fraction},
    )


def decode_several(jobs: Sequence[tuple[tuple[Tensor, ...], Tensor]], grid: IntegerGrid, group: int) -> None:
    """Fill two or three tensors [numel] from what `encode_several` stored."""
    _launch(_decode_kernel, [(out, kept) for kept, out in jobs], grid, group, (), {"ZERO": grid.zero})


def _launch(
    kernel: Any,
    jobs: list[tuple[Tensor, tuple[Tensor, ...]]],
    grid: IntegerGrid,
    group: int,
    numbers: tuple[float, ...],
    constants: dict[str, Any],
) -> None:
    """Run `kernel` on all the jobs: (values, (codes, steps)) each."""
    block = triton.next_power_of_2(group)
    rows = max(TILE // block, 1)
    arguments: list[Any] = []
    widths = 0, 0
    # Arguments that no program gets to are those of the first tensor.
    for flat, (codes, steps) in [*jobs, *jobs[:1] * (SEVERAL - len(jobs))]:
        (width, low), (high_width, high) = low_and_high(codes, flat.numel(), grid.bits)
        widths = width, high_width
        arguments += [flat, low, high, steps, flat.numel(), low.numel(), high.numel(), steps.numel()]
    programs = max(triton.cdiv(steps.numel(), rows) for _, (_, steps) in jobs)
    with torch.cuda.device_of(jobs[0][0]):
        kernel[(programs, len(jobs))](
            *arguments,
            *numbers,
            GROUP=group,
            BLOCK=block,
            ROWS=rows,
            BITS=widths[0],
            HIGH_BITS=widths[1],
            **constants,
            enable_fp_fusion=False,
        )
