"""The contract of a codec: a tensor goes in, fewer bytes are kept, a tensor comes out.

A codec is pure: it knows no autograd, no model and no process group, and never touches the global random
state, so that switching it on changes no dropout mask of the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.backend import backend_of

__all__ = [
    "TINY_PEAK",
    "Codec",
    "Encoded",
    "Exact",
    "FloatCodec",
    "StorageLayout",
    "chunks",
    "flatten",
    "unflatten",
]

TINY_PEAK = 2.0**-100
"""Largest magnitude of a group below which its step would leave fp32's normal range, where devices disagree (flush to zero)."""

StorageLayout = tuple[tuple[torch.dtype, int], ...]
"""dtype and number of elements of each stored tensor."""

# On a CPU, 2^18 elements keep every intermediate of a codec in the second-level cache; elsewhere a chunk
# only bounds the temporary memory.
_CPU_CHUNK = 1 << 18
_DEVICE_CHUNK = 1 << 25


@dataclass(frozen=True)
class Encoded:
    """What a codec keeps of a tensor.

    Attributes:
        tensors: the stored data, as the codec lays it out.
        shape: shape of the original.
        dtype: dtype of the original.
        order: the order of the dimensions in memory when the original was dense but not contiguous.
    """

    tensors: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype
    order: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


class Codec(ABC):
    """Encode a tensor into fewer bytes and decode it to its original shape and dtype.

    Attributes:
        name: the registered name.
        lossless: decode(encode(x)) equals x bit for bit.
        unbiased: the mean of decode(encode(x)) over the random draws is x.
        linear_only: fit for the input of linear layers, of which a mean is taken over tokens, and nothing else.
    """

    name: str
    lossless: bool = False
    unbiased: bool = False
    linear_only: bool = False

    @abstractmethod
    def encode(self, x: Tensor) -> Encoded:
        """Compress a tensor of any shape (zero-size and 0-d included), strides and device.

        Raises:
            TypeError: the codec does not take tensors of this dtype.
        """

    @abstractmethod
    def decode(self, e: Encoded) -> Tensor:
        """Return the tensor that `e` stands for, with its shape, dtype and (if it was dense) strides."""

    @abstractmethod
    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        """Return dtype and length of each tensor that `encode` stores for `numel` elements of `dtype`."""

    def row_parts(self, rows: int, width: int) -> list[tuple[int, int]]:
        """Return first row and end of the parts of [rows, width] that can be encoded one after the other.

        A codec that cannot store a tensor in parts has one part: the whole.
        """
        return [(0, rows)]

    def encode_parts(self, make: Callable[[int], Tensor], count: int, shape: torch.Size) -> Encoded:
        """Encode a contiguous tensor that never exists as a whole.

        Args:
            make: number of a part of `row_parts` -> its rows [n, width]; may be called again.
            count: parts.
            shape: of the whole tensor, [..., width].
        """
        return self.encode(make(0).view(shape))

    def part(self, e: Encoded, start: int, stop: int) -> Encoded:
        """Return what stands for the rows `start` to `stop`, one of the parts: [stop - start, width]."""
        return Encoded(e.tensors, torch.Size([stop - start, e.shape[-1]]), e.dtype)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the exact bytes that `encode` stores for a tensor of this shape and dtype."""
        return sum(kept.itemsize * n for kept, n in self.storage(math.prod(shape), dtype))

    def bits_per_element(self, dtype: torch.dtype = torch.bfloat16) -> float:
        """Return the stored bits per element of a large tensor, scales and indices included."""
        numel = 1 << 24
        return 8 * self.nbytes((numel,), dtype) / numel

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"


class Exact(Codec):
    """Keep the tensor itself, of any dtype, without a copy."""

    name = "exact"
    lossless = True
    unbiased = True

    def encode(self, x: Tensor) -> Encoded:
        return Encoded((x.detach(),), x.shape, x.dtype)

    def decode(self, e: Encoded) -> Tensor:
        return e.tensors[0]

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        return ((dtype, numel),)


class FloatCodec(Codec):
    """Template of the lossy codecs: they see a flat floating-point tensor and fill preallocated storage."""

    @torch.no_grad()
    def encode(self, x: Tensor) -> Encoded:
        if not x.is_floating_point():
            raise TypeError(f"codec {self.name!r} takes floating-point tensors, got {x.dtype}")
        flat, order = flatten(x.detach())
        kept = tuple(flat.new_empty(n, dtype=dtype) for dtype, n in self.storage(flat.numel(), x.dtype))
        backend = backend_of(flat)
        if backend == "triton":
            self._encode_in_triton(flat, kept)
        elif backend == "torch":
            self._encode(flat, kept)
        return Encoded(kept, x.shape, x.dtype, order)

    @torch.no_grad()
    def decode(self, e: Encoded) -> Tensor:
        flat = e.tensors[0].new_empty(e.shape.numel(), dtype=e.dtype)
        backend = backend_of(flat)
        if backend == "triton":
            self._decode_in_triton(e.tensors, flat)
        elif backend == "torch":
            self._decode(e.tensors, flat)
        return unflatten(flat, e.shape, e.order)

    @abstractmethod
    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        """Fill `kept` (laid out as `storage` says) from `flat` [numel]."""

    @abstractmethod
    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        """Fill `out` [numel] from `kept`."""

    def _encode_in_triton(self, flat: Tensor, kept: tuple[Tensor, ...]) -> None:
        """Do as `_encode`, to the same bits, in one kernel; by default `_encode` runs on the device."""
        self._encode(flat, kept)

    def _decode_in_triton(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        """Do as `_decode`, to the same bits, in one kernel; by default `_decode` runs on the device."""
        self._decode(kept, out)


def chunks(numel: int, device: torch.device, multiple: int) -> Iterator[tuple[int, int]]:
    """Yield the bounds of consecutive pieces of `numel` elements, each but the last a multiple of `multiple` long."""
    size = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    size = max(size // multiple, 1) * multiple
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


def _memory_order(x: Tensor) -> tuple[int, ...]:
    return tuple(sorted(range(x.dim()), key=lambda dim: (-x.stride()[dim], dim)))


def flatten(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the elements of `x` in memory order [numel], without a copy when it is dense, and its dimension order."""
    if x.is_contiguous():
        return x.view(-1), ()
    order = _memory_order(x)
    permuted = x.permute(order)
    if permuted.is_contiguous():
        return permuted.view(-1), order
    return x.contiguous().view(-1), ()


def unflatten(flat: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    """Return the view of `flat` [numel] of this shape and, where there is one, dimension order in memory."""
    if not order:
        return flat.view(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[dim] for dim in order]).permute(inverse)
