"""Absmax integers behind a standardisation of each channel.

Trained transformers have a few channels far from the rest, by mean and by size, in every token: in a norm's x_hat,
in the residual stream, in keys. A scale that such a channel shares with its neighbours loses the others. Mean and
deviation of each channel over the tokens cost eight bytes per channel and tensor, and leave the integers something
close to N(0, 1).

Decoders also have a token or two (the first, delimiters) whose hidden state is a hundred or a thousand times the others'
(Sun et al. 2024, "Massive activations in large language models"). Such a token has scales of its own, those of its groups,
but must not make the deviation of its channels: a row counts for at most as much as the median row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.backend import backend_of
from slimfit_ds.activations.codecs.base import (
    Codec,
    Encoded,
    StorageLayout,
    chunks,
    flatten,
    unflatten,
)

__all__ = ["ChannelAffine", "StandardisedChannels"]


@dataclasses.dataclass(frozen=True)
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
        """Take statistics that broadcast against a dense `x`: [1, ..., width], or [1, heads, 1, width] of 4 dimensions."""
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


class StandardisedChannels(Codec):
    """Encode (x - mean) / deviation, both per channel.

    A channel is an index of the last dimension, and, for `[batch, heads, tokens, width]`, of a head; a vector is one.

    Args:
        inner: codec of the standardised values.
    """

    def __init__(self, inner: AbsmaxCodec):
        self.inner = inner
        self.name = f"{inner.name}_channel"

    @torch.no_grad()
    def encode(self, x: Tensor) -> Encoded:
        if not x.is_floating_point():
            raise TypeError(f"codec {self.name!r} takes floating-point tensors, got {x.dtype}")
        mean, deviation = _statistics(x)
        inverse = deviation.float().reciprocal()
        offset = -mean.float() * inverse
        encoded = self._encode_standardised(x, inverse, offset)
        return dataclasses.replace(encoded, tensors=(*encoded.tensors, mean, deviation))

    def _encode_standardised(self, x: Tensor, inverse: Tensor, offset: Tensor) -> Encoded:
        if backend_of(x) == "triton" and x.dim() > 1:
            flat, order = flatten(x.detach())
            if order or x.is_contiguous():  # the elements fill their memory
                from slimfit_ds.activations.codecs.triton_absmax import encode_absmax

                layout = self.inner.storage(flat.numel(), x.dtype)
                kept = tuple(flat.new_empty(n, dtype=dtype) for dtype, n in layout)
                encode_absmax(flat, kept, self.inner, ChannelAffine.of(x, inverse, offset))
                return Encoded(kept, x.shape, x.dtype, order)
        bounds = self._parts(x.shape, x.is_contiguous())
        if len(bounds) == 1:
            return self.inner.encode(torch.addcmul(offset, x, inverse, out=torch.empty_like(x)))
        rows, inverse, offset = x.view(-1, x.shape[-1]), inverse.view(-1), offset.view(-1)

        def standardised(index: int) -> Tensor:
            part = rows[slice(*bounds[index])]
            return torch.addcmul(offset, part, inverse, out=torch.empty_like(part))

        return self.inner.encode_parts(standardised, len(bounds), x.shape)

    @torch.no_grad()
    def decode(self, e: Encoded) -> Tensor:
        *inner, mean, deviation = e.tensors
        encoded = dataclasses.replace(e, tensors=tuple(inner))
        if backend_of(mean) == "triton" and len(e.shape) > 1:
            flat = mean.new_empty(e.shape.numel())
            x = unflatten(flat, e.shape, e.order)
            if flat.numel():
                from slimfit_ds.activations.codecs.triton_absmax import decode_absmax

                decode_absmax(encoded.tensors, flat, self.inner, ChannelAffine.of(x, deviation, mean))
            return x
        bounds = self._parts(e.shape, contiguous=not e.order)
        mean, deviation = mean.float(), deviation.float()
        if len(bounds) == 1:
            values = self.inner.decode(encoded)
            return torch.addcmul(mean, values, deviation, out=values)
        mean, deviation = mean.view(-1), deviation.view(-1)
        whole = mean.new_empty(e.shape, dtype=e.dtype)
        rows = whole.view(-1, e.shape[-1])
        for start, stop in bounds:
            values = self.inner.decode(self.inner.part(encoded, start, stop))
            torch.addcmul(mean, values, deviation, out=rows[start:stop])
        return whole

    def _parts(self, shape: torch.Size, contiguous: bool) -> list[tuple[int, int]]:
        """Return the rows to standardise at a time: a CPU mixes dtypes in fp32 copies of all operands."""
        if not contiguous or len(shape) in (0, 4) or not shape.numel():
            return [(0, 0)]
        return self.inner.row_parts(shape.numel() // shape[-1], shape[-1])

    def row_parts(self, rows: int, width: int) -> list[tuple[int, int]]:
        return self.inner.row_parts(rows, width)

    def encode_parts(self, make: Callable[[int], Tensor], count: int, shape: torch.Size) -> Encoded:
        """Make each part twice, once for the statistics and once for the codes."""
        if count == 1:
            return self.encode(make(0).view(shape))
        # What is made is normalised row by row already.
        parts = (make(index) for index in range(count))
        mean, deviation = _pooled(*_stacked(_moments(rows, rows.new_ones(len(rows), 1)) for rows in parts))
        inverse, offset = deviation.reciprocal(), -mean / deviation
        encoded = self.inner.encode_parts(
            lambda index: torch.addcmul(offset, make(index), inverse), count, shape
        )
        ones = (1,) * (len(shape) - 1)
        statistics = mean.view(*ones, -1), deviation.view(*ones, -1)
        return dataclasses.replace(encoded, tensors=(*encoded.tensors, *statistics))

    def part(self, e: Encoded, start: int, stop: int) -> Encoded:
        *inner, mean, deviation = e.tensors
        part = self.inner.part(dataclasses.replace(e, tensors=tuple(inner)), start, stop)
        statistics = mean.view(1, -1), deviation.view(1, -1)
        return dataclasses.replace(part, tensors=(*part.tensors, *statistics))

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        channels = shape[-1] * (shape[1] if len(shape) == 4 else 1) if len(shape) > 1 else 1
        return self.inner.nbytes(shape, dtype) + 2 * channels * dtype.itemsize

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        """Leave out the two numbers per channel, which `numel` does not tell."""
        return self.inner.storage(numel, dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and deviation (1 where it is 0) of each channel, broadcasting against x.

    In the dtype of x: decoding undoes exactly these rounded statistics, and no wider copy of x is made.
    """
    shape = [1] * x.dim()
    if x.dim() > 1:
        shape[-1] = x.shape[-1]
    if x.dim() == 4:
        shape[1] = x.shape[1]
    if backend_of(x) == "none":  # fake, or empty
        return x.new_zeros(shape), x.new_ones(shape)
    if x.dim() == 4:
        heads = [_statistics(x[:, head]) for head in range(x.shape[1])]
        mean, deviation = (torch.stack(each, 1) for each in zip(*heads, strict=True))
        return mean, deviation
    # The order of the rows does not matter.
    flat, order = flatten(x.detach())
    rows = (x.detach().contiguous() if order and order[-1] != x.dim() - 1 else flat).view(
        -1, shape[-1] if shape else 1
    )
    if backend_of(x) == "triton":
        from slimfit_ds.activations.codecs.triton_channels import loudness_of, moments_of

        moments = moments_of(rows, _weights(loudness_of(rows)))
    else:
        bounds = [b // rows.shape[1] for _, b in chunks(rows.numel(), rows.device, rows.shape[1])]
        parts = rows.tensor_split(bounds[:-1])
        weights = _weights(torch.cat([part.float().square().mean(1, keepdim=True) for part in parts]))
        moments = _stacked(map(_moments, parts, weights.tensor_split(bounds[:-1])))
    mean, deviation = (each.to(x.dtype).view(shape) for each in _pooled(*moments))
    # Rounding to the dtype of x may have made it 0.
    return mean, deviation.masked_fill(deviation == 0, 1)


def _stacked(moments: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    totals, means, variances = zip(*moments, strict=True)
    return torch.stack(totals), torch.stack(means), torch.stack(variances)


def _weights(loudness: Tensor) -> Tensor:
    """Return what rows of these mean squares [n, 1] count for: 1, or less where they are louder than the median."""
    return (loudness.median() / loudness).clamp_(max=1).nan_to_num_(1)


def _moments(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the total weight, and mean and variance per channel of rows [n, width] that count for `weights` [n, 1]."""
    rows = rows.float()
    total = weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
    mean = (rows * weights).sum(0) / total
    return total, mean, ((rows - mean).square_() * weights).sum(0) / total


def _pooled(totals: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 mean and deviation [width], 1 where it is 0, of all rows from those of parts [parts, width].

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    weights = (totals.double() / totals.double().sum())[:, None]
    mean = (weights * means.double()).sum(0)
    between = (means.double() - mean).square()
    deviation = (weights * (variances.double() + between)).sum(0).sqrt().float()
    return mean.float(), torch.where(deviation > 0, deviation, 1.0)
