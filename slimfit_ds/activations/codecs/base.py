"""The contract of a codec: a tensor goes in, fewer bytes are kept, a tensor comes out.

A codec is pure: it knows no autograd, no model and no process group, and never touches the global random
state, so that switching it on changes no dropout mask of the model.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "Codec",
    "Encoded",
    "FloatCodec",
    "StorageLayout",
    "chunks",
    "fakes_stand_for_a_cpu",
    "flatten",
    "is_dense",
    "is_fake",
    "stands_for_device",
    "unflatten",
]

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
        meta: the order of the dimensions in memory when the original was dense but not contiguous.
    """

    tensors: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype
    meta: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


class Codec(ABC):
    """Encodes a tensor into fewer bytes and decodes it to its original shape and dtype.

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
    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Encoded:
        """Compress a tensor.

        Args:
            x: any shape, zero-size and 0-d included; any strides; any device.
            generator: random bits for codecs that round stochastically, on the device of `x`. By default
                such a codec draws from a generator of its own, never from the global one.

        Raises:
            TypeError: the codec does not take tensors of this dtype.
        """

    @abstractmethod
    def decode(self, e: Encoded) -> Tensor:
        """The tensor that `e` stands for, with the shape, dtype and (if it was dense) strides it had."""

    def encode_all(self, tensors: Sequence[Tensor]) -> list[Encoded]:
        """`encode` of each; a codec may do it at once."""
        return [self.encode(x) for x in tensors]

    def decode_all(self, encoded: Sequence[Encoded]) -> list[Tensor]:
        """`decode` of each; a codec may do it at once."""
        return [self.decode(e) for e in encoded]

    @abstractmethod
    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        """dtype and length of each tensor that `encode` stores for `numel` elements of `dtype`."""

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Exact bytes that `encode` stores for a tensor of this shape and dtype."""
        return sum(kept.itemsize * n for kept, n in self.storage(math.prod(shape), dtype))

    def bits_per_element(self, dtype: torch.dtype = torch.bfloat16) -> float:
        """Stored bits per element of a large tensor, scales and indices included."""
        numel = 1 << 24
        return 8 * self.nbytes((numel,), dtype) / numel

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r})"


class FloatCodec(Codec):
    """Template of the lossy codecs: they see a flat floating-point tensor and fill preallocated storage.

    Under FakeTensorMode and on `meta` only the outputs are made: a real device encodes in one fused pass
    without temporaries, and that is what a memory estimate has to see.
    """

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Encoded:
        return self._encode_each([x], generator)[0]

    def encode_all(self, tensors: Sequence[Tensor]) -> list[Encoded]:
        return self._encode_each(tensors, None)

    @torch.no_grad()
    def _encode_each(self, tensors: Sequence[Tensor], generator: torch.Generator | None) -> list[Encoded]:
        encoded, jobs = [], []
        for x in tensors:
            if not x.is_floating_point():
                raise TypeError(f"codec {self.name!r} takes floating-point tensors, got {x.dtype}")
            flat, order = flatten(x.detach())
            kept = tuple(flat.new_empty(n, dtype=dtype) for dtype, n in self.storage(flat.numel(), x.dtype))
            if flat.numel() and not is_fake(flat):
                jobs.append((flat, kept))
            encoded.append(Encoded(kept, x.shape, x.dtype, order))
        self._encode_flat(jobs, generator)
        return encoded

    def decode(self, e: Encoded) -> Tensor:
        return self.decode_all([e])[0]

    @torch.no_grad()
    def decode_all(self, encoded: Sequence[Encoded]) -> list[Tensor]:
        decoded, jobs = [], []
        for e in encoded:
            flat = e.tensors[0].new_empty(e.shape.numel(), dtype=e.dtype)
            if flat.numel() and not is_fake(flat):
                jobs.append((e.tensors, flat))
            decoded.append(unflatten(flat, e.shape, e.meta))
        self._decode_flat(jobs)
        return decoded

    def _encode_flat(
        self, jobs: Sequence[tuple[Tensor, tuple[Tensor, ...]]], generator: torch.Generator | None
    ) -> None:
        """Fill what is kept of each flat tensor."""
        for flat, kept in jobs:
            self._encode(flat, kept, generator)

    def _decode_flat(self, jobs: Sequence[tuple[tuple[Tensor, ...], Tensor]]) -> None:
        """Fill each flat tensor from what is kept of it."""
        for kept, out in jobs:
            self._decode(kept, out)

    @abstractmethod
    def _encode(self, flat: Tensor, kept: tuple[Tensor, ...], generator: torch.Generator | None) -> None:
        """Fill `kept` (laid out as `storage` says) from `flat` [numel]."""

    @abstractmethod
    def _decode(self, kept: tuple[Tensor, ...], out: Tensor) -> None:
        """Fill `out` [numel] from `kept`."""


def chunks(numel: int, device: torch.device, multiple: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive pieces of `numel` elements, each but the last a multiple of `multiple` long."""
    size = _CPU_CHUNK if device.type == "cpu" else _DEVICE_CHUNK
    size = max(size // multiple, 1) * multiple
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


def is_fake(x: Tensor) -> bool:
    """True where there is no data: on `meta` and under FakeTensorMode."""
    return x.is_meta or isinstance(x, FakeTensor)


_fakes_on_cpu = False


@contextmanager
def fakes_stand_for_a_cpu() -> Iterator[None]:
    """Inside, fake tensors take the ways of real ones of this CPU, not those of a device with kernels of its own."""
    global _fakes_on_cpu
    before, _fakes_on_cpu = _fakes_on_cpu, True
    try:
        yield
    finally:
        _fakes_on_cpu = before


def stands_for_device(x: Tensor) -> bool:
    """True for fake tensors that stand for those of a device with Triton's kernels."""
    return is_fake(x) and not _fakes_on_cpu


def is_dense(x: Tensor) -> bool:
    """True where the elements fill their memory, in whatever order of the dimensions."""
    return x.permute(_memory_order(x)).is_contiguous()


def _memory_order(x: Tensor) -> tuple[int, ...]:
    return tuple(sorted(range(x.dim()), key=lambda dim: (-x.stride()[dim], dim)))


def flatten(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The elements of `x` in memory order [numel] without a copy when it is dense, and its dimension order."""
    if x.is_contiguous():
        return x.view(-1), ()
    order = _memory_order(x)
    permuted = x.permute(order)
    if permuted.is_contiguous():
        return permuted.view(-1), order
    return x.contiguous().view(-1), ()


def unflatten(flat: Tensor, shape: torch.Size, order: tuple[int, ...]) -> Tensor:
    """The view of `flat` [numel] that has this shape and, where there is one, dimension order in memory."""
    if not order:
        return flat.view(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[dim] for dim in order]).permute(inverse)
