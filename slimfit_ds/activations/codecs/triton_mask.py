"""Triton twin of the bit-packed mask: one pass over the data."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimfit_ds.activations.codecs.triton_packing import load_plane, store_plane

__all__ = ["decode_mask", "encode_mask"]

_TILE = 8192


@triton.jit
def _encode_kernel(bytes_ptr, codes_ptr, numel, stored_bytes, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    code = tl.load(bytes_ptr + offset, mask=offset < numel, other=0).to(tl.int32)
    store_plane(codes_ptr, code, row, stored_bytes, 1, 1, TILE, TILE)


@triton.jit
def _decode_kernel(codes_ptr, bytes_ptr, numel, stored_bytes, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    code = load_plane(codes_ptr, row, stored_bytes, 1, 1, TILE, TILE)
    offset = row[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(bytes_ptr + offset, code.to(tl.uint8), mask=offset < numel)


def encode_mask(flat: Tensor, packed: Tensor) -> None:
    """Fill `packed`, uint8 [ceil(numel / 8)], from `flat`, bool [numel]; the first element takes the lowest bit."""
    with torch.cuda.device_of(flat):
        _encode_kernel[(triton.cdiv(flat.numel(), _TILE),)](
            flat.view(torch.uint8), packed, flat.numel(), packed.numel(), TILE=_TILE
        )


def decode_mask(packed: Tensor, out: Tensor) -> None:
    """Fill `out`, bool [numel], from what `encode_mask` stored."""
    with torch.cuda.device_of(out):
        _decode_kernel[(triton.cdiv(out.numel(), _TILE),)](
            packed, out.view(torch.uint8), out.numel(), packed.numel(), TILE=_TILE
        )
