"""Runs the codecs of CPU tensors by `cpu_kernels.c`, where that compiles: the same bits as the torch versions, faster."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from slimfit_ds import native
from slimfit_ds.activations.codecs.packing import low_and_high

__all__ = [
    "decode_absmax",
    "decode_table",
    "encode_absmax",
    "encode_table",
    "runs_in_c",
]

_SOURCE = Path(__file__).with_name("cpu_kernels.c")
_NAMES = {torch.float32: "f32", torch.bfloat16: "b16"}
_MAX_GROUP = 1024


def runs_in_c(x: Tensor, bits: int, group: int = 8) -> bool:
    """True for real CPU tensors of a dtype, width of codes and group that the kernels take, where they compile."""
    return (
        x.device.type == "cpu"
        and x.dtype in _NAMES
        and bits in (4, 5, 6, 8)
        and group <= _MAX_GROUP
        and _library() is not None
    )


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load(_SOURCE)
    return None if library is None else _typed(library)


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number, count, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    arguments = {
        "encode_absmax": [pointer, count, *[number] * 4, real, real, *[pointer] * 3],
        "decode_absmax": [pointer, count, *[number] * 5, *[pointer] * 3],
        "decode_table": [pointer, count, pointer, number, number, pointer, pointer],
    }
    for name, types in arguments.items():
        for suffix in _NAMES.values():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = types, None
    library.encode_table.argtypes = [pointer, number, count, pointer, number, number, pointer, pointer]
    library.encode_table.restype = None
    return library


def _function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    return getattr(_library(), f"{name}_{_NAMES[dtype]}")


def encode_absmax(
    flat: Tensor,
    codes: Tensor,
    steps: Tensor,
    *,
    group: int,
    bits: int,
    zero: int,
    half_width: float,
    tiny_peak: float,
) -> None:
    """Fill `codes` and `steps` from `flat`, rounded to nearest; the arguments of `triton_absmax.encode_absmax`."""
    (low, low_plane), (high, high_plane) = low_and_high(codes, flat.numel(), bits)
    _function("encode_absmax", flat.dtype)(
        flat.data_ptr(),
        flat.numel(),
        group,
        low,
        high,
        zero,
        1.0 / half_width,
        tiny_peak,
        low_plane.data_ptr(),
        high_plane.data_ptr(),
        steps.data_ptr(),
    )


def decode_absmax(codes: Tensor, steps: Tensor, out: Tensor, *, group: int, bits: int, zero: int) -> None:
    """Fill `out` [numel] from what `encode_absmax` stored."""
    (low, low_plane), (high, high_plane) = low_and_high(codes, out.numel(), bits)
    _function("decode_absmax", out.dtype)(
        out.data_ptr(),
        out.numel(),
        group,
        low,
        high,
        zero,
        codes.dtype == torch.int8,
        low_plane.data_ptr(),
        high_plane.data_ptr(),
        steps.data_ptr(),
    )


def encode_table(flat: Tensor, packed: Tensor, table: Tensor, *, bits: int) -> None:
    """Fill `packed` from `flat` by the code of each bf16 pattern, uint8 `table` [65536]."""
    (low, low_plane), (high, high_plane) = low_and_high(packed, flat.numel(), bits)
    wide = flat.dtype == torch.float32
    # The upper half of a little-endian fp32 value lies behind the lower one.
    first = flat.data_ptr() + (2 if wide else 0)
    library = _library()
    assert library is not None
    library.encode_table(
        first,
        2 if wide else 1,
        flat.numel(),
        table.data_ptr(),
        low,
        high,
        low_plane.data_ptr(),
        high_plane.data_ptr(),
    )


def decode_table(packed: Tensor, levels: Tensor, out: Tensor, *, bits: int) -> None:
    """Fill `out` [numel] with `levels` [2^bits], in its dtype, of the codes in `packed`."""
    (low, low_plane), (high, high_plane) = low_and_high(packed, out.numel(), bits)
    _function("decode_table", out.dtype)(
        out.data_ptr(),
        out.numel(),
        levels.data_ptr(),
        low,
        high,
        low_plane.data_ptr(),
        high_plane.data_ptr(),
    )
