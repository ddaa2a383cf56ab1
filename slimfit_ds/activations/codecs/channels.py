"""Absmax integers behind a standardisation of rows and channels.

Trained transformers have a few channels far from the rest, by mean and by size, in every token: in a norm's x_hat,
in the residual stream, in keys. A scale that such a channel shares with its neighbours loses the others. Mean and
deviation of each channel over the tokens cost a few bytes per channel and tensor, and leave the integers something
close to N(0, 1).

Tokens differ in size as well. Decoders have one or two (the first, delimiters) whose hidden state is a thousand times the others'
(Sun et al. 2024, "Massive activations in large language models"), which must not make the deviation of its channels; others are
padding, or a class token, of next to nothing, whose rounding a norm would blow up. So each row is divided by its root
mean square first, two bytes per row, and every row is rounded to its own size. A row of zeros stays zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.backend import backend_of
from slimfit_ds.activations.codecs.base import TINY_PEAK, Codec, Encoded, StorageLayout, flatten, unflatten

__all__ = ["ChannelAffine", "StandardisedChannels"]


@dataclasses.dataclass(frozen=True)
class ChannelAffine:
    """A scale per row, and `value * scale + offset` per channel, of a dense tensor whose rows lie innermost; in fp32.

    The channel of the element at position `i` in memory is `i // head_stride % heads * width + i % width`.

    Attributes:
        rows: fp32, or what casts to it, [rows] in memory order.
        scale: likewise, [heads * width].
        offset: likewise.
        heads: 1 where a channel is an index of the last dimension alone.
        width: length of a row.
        head_stride: elements in memory between two heads.
        rows_first: whether rows are scaled before channels.
    """

    rows: Tensor
    scale: Tensor
    offset: Tensor
    heads: int
    width: int
    head_stride: int
    rows_first: bool

    @classmethod
    def of(cls, x: Tensor, rows: Tensor, scale: Tensor, offset: Tensor, *, rows_first: bool) -> ChannelAffine:
        """Take statistics that broadcast against a dense `x`: [1, ..., width], or [1, heads, 1, width] of 4 dimensions."""
        per_head = x.dim() == 4
        return cls(
            rows,
            scale.reshape(-1),
            offset.reshape(-1),
            heads=scale.shape[1] if per_head else 1,
            width=scale.shape[-1],
            # Dimensions of length 1 may have any stride, 0 too.
            head_stride=max(x.stride(1), 1) if per_head else 1,
            rows_first=rows_first,
        )


class StandardisedChannels(Codec):
    """Encode (x / r - mean) / deviation, with r the root mean square of a row, mean and deviation those of a channel.

    A row is one index of all dimensions but the last; a channel is an index of the last dimension, and, for
    `[batch, heads, tokens, width]`, of a head. A vector is one row and one channel.

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
        backend, (lying, order, of_x) = backend_of(x), _rows_innermost(x.detach())
        statistics = rows, mean, deviation = _statistics(lying, order)
        if backend == "torch" or (backend == "triton" and x.dim() < 2):
            shape = _divided(lying.shape)
            parts = self.row_parts(shape[0], shape[1:].numel())
            encoded = self._encode(
                lambda index: lying.view(shape)[slice(*parts[index])],
                parts,
                shape,
                rows,
                *(_turned(each, order) for each in (mean, deviation)),
            )
            kept = encoded.tensors
        else:
            kept = tuple(x.new_empty(n, dtype=dtype) for dtype, n in self.inner.storage(x.numel(), x.dtype))
            if backend == "triton":
                from slimfit_ds.activations.codecs.triton_absmax import encode_absmax

                inverse = deviation.float().reciprocal()
                laid = unflatten(lying.view(-1), x.shape, order)
                scales = _inverse(rows), inverse, -mean.float() * inverse
                encode_absmax(
                    lying.view(-1), kept, self.inner, ChannelAffine.of(laid, *scales, rows_first=True)
                )
        return Encoded((*kept, *statistics), x.shape, x.dtype, of_x)

    def _encode(
        self,
        make: Callable[[int], Tensor],
        parts: Sequence[tuple[int, int]],
        shape: torch.Size,
        rows: Tensor,
        mean: Tensor,
        deviation: Tensor,
    ) -> Encoded:
        """Encode `make(part)` [n, ..., width]; statistics broadcast against it, but `rows` [rows]."""
        inverse = deviation.float().reciprocal()
        offset = -mean.float() * inverse
        scale = _inverse(rows).view(*shape[:-1], 1)

        def standardised(index: int) -> Tensor:
            part = torch.mul(make(index), scale[slice(*parts[index])]).float()
            return torch.addcmul(offset, part, inverse, out=part)

        return self.inner.encode_parts(standardised, len(parts), shape)

    @torch.no_grad()
    def decode(self, e: Encoded) -> Tensor:
        *inner, rows, mean, deviation = e.tensors
        # Where rows do not lie innermost they were encoded from a copy.
        order = e.order if not e.order or e.order[-1] == len(e.shape) - 1 else ()
        flat = mean.new_empty(e.shape.numel(), dtype=e.dtype)
        x, backend = unflatten(flat, e.shape, order), backend_of(flat)
        if backend == "triton" and len(e.shape) > 1:
            from slimfit_ds.activations.codecs.triton_absmax import decode_absmax

            affine = ChannelAffine.of(x, rows, deviation, mean, rows_first=False)
            decode_absmax(tuple(inner), flat, self.inner, affine)
        elif backend != "none":
            shape = _divided(x.permute(order).shape if order else e.shape)
            out, scale = flat.view(shape), rows.float().view(*shape[:-1], 1)
            mean, deviation = (_turned(each.float(), order) for each in (mean, deviation))
            whole = Encoded(tuple(inner), torch.Size([shape[0], shape[1:].numel()]), torch.float32)
            for start, stop in self.row_parts(*whole.shape):
                values = self.inner.decode(self.inner.part(whole, start, stop)).view(-1, *shape[1:])
                torch.addcmul(mean, values, deviation, out=values)
                torch.mul(values, scale[start:stop], out=out[start:stop])
        if order == e.order:
            return x
        return unflatten(torch.empty_like(flat), e.shape, e.order).copy_(x)

    def row_parts(self, rows: int, width: int) -> list[tuple[int, int]]:
        return self.inner.row_parts(rows, width)

    @torch.no_grad()
    def encode_parts(self, make: Callable[[int], Tensor], count: int, shape: torch.Size) -> Encoded:
        """Make each part twice, once for the statistics and once for the codes."""
        if count == 1:
            return self.encode(make(0).view(shape))
        parts = self.row_parts(shape[:-1].numel(), shape[-1])
        sizes, moments = [], []
        for index in range(count):
            part = make(index)
            sizes.append(_row_sizes(part))
            moments.append(_moments(part.float() * _inverse(sizes[-1])[:, None]))
        ones = (1,) * (len(shape) - 1)
        rows = torch.cat(sizes)
        mean, deviation = (each.to(part.dtype) for each in _pooled(*_stacked(moments)))
        encoded = self._encode(make, parts, torch.Size([len(rows), shape[-1]]), rows, mean, deviation)
        tensors = (*encoded.tensors, rows, mean.view(*ones, -1), deviation.view(*ones, -1))
        return Encoded(tensors, shape, part.dtype)

    def part(self, e: Encoded, start: int, stop: int) -> Encoded:
        *inner, rows, mean, deviation = e.tensors
        part = self.inner.part(dataclasses.replace(e, tensors=tuple(inner)), start, stop)
        statistics = rows[start:stop], mean.view(1, -1), deviation.view(1, -1)
        return dataclasses.replace(part, tensors=(*part.tensors, *statistics))

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        numel = torch.Size(shape).numel()
        width = shape[-1] if len(shape) > 1 else numel
        channels = shape[-1] * (shape[1] if len(shape) == 4 else 1) if len(shape) > 1 else 1
        rows = numel // width if width else torch.Size(shape[:-1]).numel()
        return self.inner.nbytes(shape, dtype) + 2 * rows + 2 * channels * dtype.itemsize

    def storage(self, numel: int, dtype: torch.dtype) -> StorageLayout:
        """Leave out what a row and a channel cost, which `numel` does not tell."""
        return self.inner.storage(numel, dtype)


def _rows_innermost(x: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Return `x` contiguous with its dimensions in their order in memory, that order, and the order that `x` has.

    They differ where rows do not lie innermost, and are copied.
    """
    flat, order = flatten(x)
    if not order:
        return flat.view(x.shape), (), ()
    if order[-1] == x.dim() - 1:
        return x.permute(order), order, order
    return x.contiguous(), (), order


def _turned(statistic: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return the statistic of a channel so that it broadcasts against what `_divided` gives."""
    if statistic.dim() == 4:
        return statistic.permute(order) if order else statistic
    return statistic.view(1, -1)


def _divided(shape: torch.Size) -> torch.Size:
    """Return the shape to take parts of, along the first dimension: rows, or for 4 dimensions those of the tensor."""
    if len(shape) == 4:
        return shape
    return torch.Size([shape[:-1].numel(), shape[-1]]) if len(shape) > 1 else torch.Size([1, shape.numel()])


def _inverse(rows: Tensor) -> Tensor:
    """Return 1 / rows in fp32, 0 where rows is."""
    rows = rows.float()
    return rows.reciprocal().masked_fill_(rows == 0, 0.0)


def _row_sizes(lying: Tensor) -> Tensor:
    """Return the root mean square of each row of [..., width], bf16 [rows]; 0 below 2^-100, infinity where one is not finite."""
    width = lying.shape[-1]
    if backend_of(lying) == "triton":
        from slimfit_ds.activations.codecs.triton_channels import mean_squares_of

        sizes = mean_squares_of(lying.view(-1, width)).sqrt_()
    else:
        wide = torch.promote_types(lying.dtype, torch.float32)
        norms = torch.linalg.vector_norm(lying, dim=-1, dtype=wide)
        sizes = norms.view(-1).float().mul_(width**-0.5)
    tiny = sizes < TINY_PEAK
    return sizes.nan_to_num_(torch.inf, torch.inf).masked_fill_(tiny, 0.0).to(torch.bfloat16)


def _statistics(lying: Tensor, order: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows' sizes, bf16 [rows] in memory order, and mean and deviation (1 where it is 0) of each channel.

    The channels' broadcast against the tensor in the order of its shape, in its dtype: decoding undoes exactly these rounded
    statistics.

    Args:
        lying: contiguous, rows innermost.
        order: of its dimensions, () for that of the shape.
    """
    dims = lying.dim()
    heads = order.index(1) if order else 1
    shape = [1] * dims
    if dims > 1:
        shape[-1] = lying.shape[-1]
    if dims == 4:
        shape[1] = lying.shape[heads]
    count = lying.shape[:-1].numel() if dims > 1 else 1
    if backend_of(lying) == "none":  # fake, or empty
        return lying.new_ones(count, dtype=torch.bfloat16), lying.new_zeros(shape), lying.new_ones(shape)
    if dims < 2:
        rows = _row_sizes(lying.view(1, -1))
        mean, deviation = _pooled(*_stacked([_moments((lying.float() * _inverse(rows)).view(-1, 1))]))
    else:
        rows = _row_sizes(lying)
        scale = _inverse(rows).view(lying.shape[:-1])
        each = zip(lying.unbind(heads), scale.unbind(heads), strict=True) if dims == 4 else [(lying, scale)]
        found = [_channel_statistics(x.reshape(-1, x.shape[-1]), scale.reshape(-1, 1)) for x, scale in each]
        mean, deviation = (torch.stack(both) for both in zip(*found, strict=True))
    mean, deviation = (each.to(lying.dtype).view(shape) for each in (mean, deviation))
    # Rounding to the dtype of x may have made it 0.
    return rows, mean, deviation.masked_fill(deviation == 0, 1)


def _channel_statistics(rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 mean and deviation [width] of rows [n, width] times `scale` [n, 1]."""
    if backend_of(rows) == "triton":
        from slimfit_ds.activations.codecs.triton_channels import moments_of

        return _pooled(*moments_of(rows.contiguous(), scale.contiguous()))
    size = max(_CHUNK // max(rows.shape[1], 1), 1)
    pairs = zip(rows.split(size), scale.split(size), strict=True)
    return _pooled(*_stacked(_moments(part.float() * factor) for part, factor in pairs))


# Elements of a part of the statistics: 1 MiB in fp32.
_CHUNK = 1 << 18


def _stacked(moments: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    totals, means, variances = zip(*moments, strict=True)
    return torch.stack(totals), torch.stack(means), torch.stack(variances)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of the fp32 rows [n, width], and their mean and variance per channel."""
    variance, mean = torch.var_mean(rows, 0, correction=0)
    return mean.new_tensor(len(rows)), mean, variance


def _pooled(totals: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 mean and deviation [width], 1 where it is 0, of all rows from those of parts [parts, width].

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    weights = (totals.double() / totals.double().sum())[:, None]
    mean = (weights * means.double()).sum(0)
    between = (means.double() - mean).square()
    deviation = (weights * (variances.double() + between)).sum(0).sqrt().float()
    return mean.float(), torch.where(deviation > 0, deviation, 1.0)
