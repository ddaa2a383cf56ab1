"""Codecs behind a standardisation of each channel.

Trained transformers have a few channels far from the rest, by mean and by size, in every token: in a norm's x_hat,
in the residual stream, in keys. A codec that was made for N(0, 1), or a scale that such a channel shares with its
neighbours, loses the others. Mean and deviation of each channel over the tokens cost eight bytes per channel and
tensor, and leave the codec something close to N(0, 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import cast

import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec, Encoded, get_codec, register_codec
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.base import flatten, is_dense, is_fake, unflatten
from slimfit_ds.activations.codecs.channel_affine import ChannelAffine, FusesChannels
from slimfit_ds.activations.codecs.rows import row_bounds
from slimfit_ds.activations.codecs.triton_support import runs_in_triton

__all__ = ["StandardisedChannels"]


class StandardisedChannels(Codec):
    """Encodes (x - mean) / deviation, both per channel.

    A channel is an index of the last dimension, and, for `[batch, heads, tokens, width]`, of a head.

    Args:
        inner: codec of the standardised values.
    """

    def __init__(self, inner: Codec):
        self.inner = inner
        self.name = f"{inner.name}_channel"
        self.unbiased = inner.unbiased

    @torch.no_grad()
    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Encoded:
        mean, std = _statistics(x)
        deviation, inverse, offset = _standardisation(mean, std)
        if self._runs_in_one_pass(x) and is_dense(x):
            encoded = self._encode_in_one_pass(x, ChannelAffine.of(x, inverse, offset), generator)
        else:
            encoded = self._encode_in_parts(x, inverse, offset, generator)
        return dataclasses.replace(encoded, tensors=(*encoded.tensors, mean, deviation))

    @torch.no_grad()
    def decode(self, e: Encoded) -> Tensor:
        *inner, mean, deviation = e.tensors
        if self._runs_in_one_pass(mean):
            flat = mean.new_empty(e.shape.numel())
            x = unflatten(flat, e.shape, e.meta)
            if flat.numel() and not is_fake(flat):
                channels = ChannelAffine.of(x, deviation, mean)
                cast(FusesChannels, self.inner).decode_in_triton(tuple(inner), flat, channels)
            return x
        encoded = dataclasses.replace(e, tensors=tuple(inner))
        bounds = list(self._parts(e.shape, contiguous=not e.meta))
        if len(bounds) == 1:
            values = self.inner.decode(encoded)
            return torch.addcmul(mean.float(), values, deviation.float(), out=values)
        assert isinstance(self.inner, AbsmaxCodec)
        width = e.shape[-1]
        mean, deviation = mean.float().view(width), deviation.float().view(width)
        whole = mean.new_empty(e.shape, dtype=e.dtype)
        rows = whole.view(-1, width)
        for start, stop in bounds:
            values = self.inner.decode(self.inner.part(encoded, start * width, stop * width))
            torch.addcmul(mean, values.view(-1, width), deviation, out=rows[start:stop])
        return whole

    def _parts(self, shape: torch.Size, contiguous: bool) -> Iterator[tuple[int, int]]:
        """Rows to standardise at a time: a CPU mixes dtypes in fp32 copies of all operands."""
        whole = not contiguous or len(shape) in (0, 4) or not shape.numel()
        width = 1 if whole else shape[-1]
        return iter([(0, 0)]) if whole else row_bounds(self.inner, shape.numel() // width, width)

    def part(self, e: Encoded, start: int, stop: int) -> Encoded:
        """The payload of the elements `start` to `stop` of a contiguous tensor, whole rows: [rows, width]."""
        assert isinstance(self.inner, AbsmaxCodec)
        *inner, mean, deviation = e.tensors
        part = self.inner.part(dataclasses.replace(e, tensors=tuple(inner)), start, stop)
        width = e.shape[-1]
        return dataclasses.replace(
            part,
            tensors=(*part.tensors, mean.view(1, width), deviation.view(1, width)),
            shape=torch.Size([(stop - start) // width, width]),
        )

    def encode_parts(self, make: Callable[[int], Tensor], count: int, shape: torch.Size) -> Encoded:
        """The payload of a tensor that is never there as a whole.

        Args:
            make: part -> its rows [n, width]; each is made twice, for the statistics and for the codes.
            count: parts.
            shape: of the whole tensor.
        """
        assert isinstance(self.inner, AbsmaxCodec)
        mean, deviation = _pooled([_moments(make(index)) for index in range(count)])
        inverse, offset = deviation.reciprocal(), -mean / deviation
        parts = [self.inner.encode(torch.addcmul(offset, part, inverse)) for part in map(make, range(count))]
        encoded = self.inner.join(parts, shape)
        ones = (1,) * (len(shape) - 1)
        return dataclasses.replace(
            encoded, tensors=(*encoded.tensors, mean.view(*ones, -1), deviation.view(*ones, -1))
        )

    def _encode_in_parts(
        self, x: Tensor, inverse: Tensor, offset: Tensor, generator: torch.Generator | None
    ) -> Encoded:
        bounds = list(self._parts(x.shape, x.is_contiguous()))
        if len(bounds) == 1:
            values = torch.addcmul(offset, x, inverse, out=torch.empty_like(x))
            return self.inner.encode(values, generator=generator)
        assert isinstance(self.inner, AbsmaxCodec)
        rows, inverse, offset = x.view(-1, x.shape[-1]), inverse.view(-1), offset.view(-1)
        parts = []
        for start, stop in bounds:
            part = rows[start:stop]
            parts.append(self.inner.encode(torch.addcmul(offset, part, inverse, out=torch.empty_like(part))))
        return self.inner.join(parts, x.shape)

    def _runs_in_one_pass(self, x: Tensor) -> bool:
        """Whether the inner codec's kernels standardise too; x or its mean, which keeps its dimensions."""
        fuses = isinstance(self.inner, FusesChannels) and self.inner.fuses_channels
        return fuses and x.dim() > 1 and runs_in_triton(x)

    def _encode_in_one_pass(
        self, x: Tensor, channels: ChannelAffine, generator: torch.Generator | None
    ) -> Encoded:
        flat, order = flatten(x.detach())
        layout = self.inner.storage(flat.numel(), x.dtype)
        kept = tuple(flat.new_empty(n, dtype=dtype) for dtype, n in layout)
        if flat.numel() and not is_fake(flat):
            cast(FusesChannels, self.inner).encode_in_triton(flat, kept, generator, channels)
        return Encoded(kept, x.shape, x.dtype, order)

    def storage(self, numel: int, dtype: torch.dtype) -> tuple[tuple[torch.dtype, int], ...]:
        """Without the two numbers per channel, which `numel` does not tell."""
        return self.inner.storage(numel, dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, broadcasting against x.

    In the dtype of x: decoding undoes exactly these rounded statistics, and no wider copy of x is made.
    """
    std, mean = torch.std_mean(x, dim=_token_dims(x.dim()), correction=0, keepdim=True)
    return mean, std


def _standardisation(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The deviation, 1 where it is 0; its inverse and `-mean / deviation` in fp32."""
    if runs_in_triton(std) and std.numel() and not is_fake(std):
        from slimfit_ds.activations.codecs.triton_channels import standardisation

        return standardisation(mean, std)
    deviation = torch.where(std > 0, std, 1.0)
    inverse = deviation.float().reciprocal()
    return deviation, inverse, -mean.float() * inverse


def _moments(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number, mean and variance per channel of fp32 rows [n, width]."""
    variance, mean = torch.var_mean(rows, dim=0, correction=0)
    return len(rows), mean, variance


def _pooled(parts: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """fp32 mean and deviation [width], 1 where it is 0, of all rows from those of the parts.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    counts, means, variances = zip(*parts, strict=True)
    weights = torch.tensor(counts, dtype=torch.float64, device=means[0].device)[:, None] / sum(counts)
    mean = (weights * torch.stack(means).double()).sum(0)
    between = (torch.stack(means).double() - mean).square()
    deviation = (weights * (torch.stack(variances).double() + between)).sum(0).sqrt().float()
    return mean.float(), torch.where(deviation > 0, deviation, 1.0)


def _token_dims(dims: int) -> tuple[int, ...]:
    """The dimensions that statistics are taken over."""
    return (0, 2) if dims == 4 else tuple(range(dims - 1))


def _factory(name: str):
    def build(**options: Hashable) -> Codec:
        return StandardisedChannels(get_codec(name, **options))

    return build


for _name in ("int8", "int6", "int5", "int4", "lm4", "lm2"):
    register_codec(f"{_name}_channel", _factory(_name))
