"""A scale and an offset per channel, and what a codec needs to apply them in its own pass over the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.base import StorageLayout

__all__ = ["ChannelAffine", "FusesChannels"]


@dataclass(frozen=True)
class ChannelAffine:
    """`value * scale + offset` of a dense tensor, rounded once to fp32 and then to the tensor's dtype.

    The channel of the element at position `i` in memory is
    `i // head_stride % heads * width + i // width_stride % width`.

    Attributes:
        scale: fp32, or what casts to it, [heads * width].
        offset: likewise.
        heads: 1 where a channel is an index of the last dimension alone.
        width: length of the last dimension.
        head_stride: elements in memory between two heads.
        width_stride: elements in memory between two channels of a head.
    """

    scale: Tensor
    offset: Tensor
    heads: int
    width: int
    head_stride: int
    width_stride: int

    @classmethod
    def of(cls, x: Tensor, scale: Tensor, offset: Tensor) -> ChannelAffine:
        """Statistics that broadcast against a dense `x`: [1, ..., width], or [1, heads, 1, width] for 4 dimensions."""
        per_head = x.dim() == 4
        return cls(
            scale.reshape(-1),
            offset.reshape(-1),
            heads=scale.shape[1] if per_head else 1,
            width=scale.shape[-1],
            # Dimensions of length 1 may have any stride, 0 too.
            head_stride=max(x.stride(1), 1) if per_head else 1,
            width_stride=max(x.stride(-1), 1),
        )


@runtime_checkable
class FusesChannels(Protocol):
    """A codec whose kernels can apply a `ChannelAffine` before encoding and after decoding.

    Attributes:
        fuses_channels: False where this instance needs the transformed tensor as a whole first.
    """

    fuses_channels: bool

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout: ...

    def encode_in_triton(
        self,
        flat: Tensor,
        kept: tuple[Tensor, ...],
        generator: torch.Generator | None,
        channels: ChannelAffine | None = None,
    ) -> None:
        """Fill `kept` (laid out as `storage` says) from `flat` [numel], transformed by `channels`."""

    def decode_in_triton(
        self, kept: tuple[Tensor, ...], out: Tensor, channels: ChannelAffine | None = None
    ) -> None:
        """Fill `out` [numel] from `kept`, and transform it by `channels`."""
