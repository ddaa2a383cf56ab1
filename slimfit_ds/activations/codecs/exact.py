"""Codecs that lose nothing: the tensor itself, and booleans packed into bits."""

from __future__ import annotations

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.base import Codec, Encoded, StorageLayout, chunks, is_fake
from slimfit_ds.activations.codecs.packing import pack, unpack_bits
from slimfit_ds.activations.codecs.triton_support import runs_in_triton

__all__ = ["BitMask", "Exact"]


class Exact(Codec):
    """Keeps the tensor itself, of any dtype, without a copy."""

    name = "exact"
    lossless = True
    unbiased = True

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Encoded:
        return Encoded((x.detach(),), x.shape, x.dtype)

    def decode(self, e: Encoded) -> Tensor:
        return e.tensors[0]

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        return ((dtype, numel),)


class BitMask(Codec):
    """Packs booleans eight to a byte, the first into the lowest bit."""

    name = "mask"
    lossless = True
    unbiased = True

    @torch.no_grad()
    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Encoded:
        if x.dtype != torch.bool:
            raise TypeError(f"codec 'mask' takes boolean tensors, got {x.dtype}")
        flat = x.contiguous().view(-1)
        packed = flat.new_empty(-(-flat.numel() // 8), dtype=torch.uint8)
        if flat.numel() and not is_fake(flat):
            self._encode(flat, packed)
        return Encoded((packed,), x.shape, x.dtype)

    @torch.no_grad()
    def decode(self, e: Encoded) -> Tensor:
        (packed,) = e.tensors
        flat = packed.new_empty(e.shape.numel(), dtype=torch.bool)
        if flat.numel() and not is_fake(flat):
            self._decode(packed, flat)
        return flat.view(e.shape)

    def _encode(self, flat: Tensor, packed: Tensor) -> None:
        if runs_in_triton(flat):
            from slimfit_ds.activations.codecs.triton_mask import encode_mask

            encode_mask(flat, packed)
            return
        for start, stop in chunks(flat.numel(), flat.device, 8):
            pack(flat[start:stop].view(torch.uint8), 1, packed[start // 8 : -(-stop // 8)])

    def _decode(self, packed: Tensor, out: Tensor) -> None:
        if runs_in_triton(out):
            from slimfit_ds.activations.codecs.triton_mask import decode_mask

            decode_mask(packed, out)
            return
        for start, stop in chunks(out.numel(), out.device, 8):
            out[start:stop] = unpack_bits(packed[start // 8 : -(-stop // 8)])[: stop - start]

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        return ((torch.uint8, -(-numel // 8)),)
