"""x_hat of a norm and its gradients for some rows at a time, where the codec allows it.

Rows are independent, so only the sums over them (the gradients of scale and bias) are rounded in another order than
for all rows at once. What is worked on in fp32 is then a few MiB, whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from slimfit_ds.activations.channels import StandardisedChannels
from slimfit_ds.activations.codecs import Codec, Encoded
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.rows import Divisible, row_bounds

__all__ = [
    "Gradients",
    "decode_rows",
    "encode_rows",
    "gradients_of_rows",
    "layer_norm_gradients",
    "rms_norm_gradients",
]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of a norm's input, scale and bias, each where it is needed."""


def encode_rows(
    x: Tensor, statistics: Callable[[Tensor], tuple[Tensor, Tensor]], codec: Codec
) -> tuple[Encoded, Tensor]:
    """The payload of x_hat and the reciprocal deviation [..., 1].

    Bit for bit as for all rows at once, but for the statistics of codecs that standardise channels.

    Args:
        x: [..., hidden].
        statistics: x_hat and the reciprocal deviation of some rows.
        codec: stores x_hat.
    """
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    bounds = list(row_bounds(codec, len(flat), width))
    if len(bounds) == 1:
        x_hat, rstd = statistics(x)
        return codec.encode(x_hat), rstd
    deviations: dict[int, Tensor] = {}

    def made(index: int) -> Tensor:
        x_hat, deviations[index] = statistics(flat[slice(*bounds[index])])
        return x_hat

    if isinstance(codec, StandardisedChannels):
        encoded = codec.encode_parts(made, len(bounds), x.shape)
    else:
        assert isinstance(codec, AbsmaxCodec)
        encoded = codec.join([codec.encode(made(index)) for index in range(len(bounds))], x.shape)
    return encoded, torch.cat([deviations[index] for index in range(len(bounds))]).view(*x.shape[:-1], 1)


def decode_rows(
    encoded: Encoded, codec: Codec, out: torch.dtype, finish: Callable[[Tensor], Tensor]
) -> Tensor:
    """What follows from x_hat, row by row.

    Args:
        encoded: x_hat [..., hidden].
        codec: decodes it.
        out: dtype of the result.
        finish: rows of x_hat -> rows of the result, of the same shape.
    """
    width = encoded.shape[-1]
    bounds = list(row_bounds(codec, math.prod(encoded.shape[:-1]), width))
    if len(bounds) == 1:
        return finish(codec.decode(encoded)).to(out)
    divisible = cast(Divisible, codec)
    whole = torch.empty(encoded.shape, dtype=out, device=encoded.tensors[0].device)
    for start, stop in bounds:
        x_hat = codec.decode(divisible.part(encoded, start * width, stop * width)).view(-1, width)
        whole.view(-1, width)[start:stop] = finish(x_hat)
    return whole


def gradients_of_rows(
    formulas: Callable[[Tensor, Tensor, Tensor | None, tuple[bool, bool, bool]], Gradients],
    dy: Tensor,
    encoded: Encoded,
    codec: Codec,
    rstd: Tensor,
    scale: Tensor | None,
    needed: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> Gradients:
    """dx in `dtype`, and the gradients of scale and bias in that of x_hat.

    Args:
        formulas: dx / rstd and the gradients of scale and bias, from dy, x_hat, scale and what is needed.
        dy: [..., hidden].
        encoded: x_hat [..., hidden].
        codec: decodes it.
        rstd: [..., 1].
        scale: [hidden] in the dtype of x_hat, or `None`.
        needed: which of the gradients.
        dtype: of dx.
    """
    width = dy.shape[-1]
    bounds = list(row_bounds(codec, dy.numel() // max(width, 1), width))
    if len(bounds) == 1:
        x_hat = codec.decode(encoded).view(dy.shape)
        dx, dscale, dbias = formulas(dy.to(x_hat.dtype), x_hat, scale, needed)
        return None if dx is None else dx.mul_(rstd).to(dtype), dscale, dbias
    divisible = cast(Divisible, codec)
    flat, rstd = dy.reshape(-1, width), rstd.view(-1, 1)
    whole = torch.empty(dy.shape, dtype=dtype, device=dy.device) if needed[0] else None
    sums: list[Tensor | None] = [None, None]
    for start, stop in bounds:
        x_hat = codec.decode(divisible.part(encoded, start * width, stop * width)).view(-1, width)
        dx, *terms = formulas(flat[start:stop].to(x_hat.dtype), x_hat, scale, needed)
        if whole is not None and dx is not None:
            whole.view(-1, width)[start:stop] = dx.mul_(rstd[start:stop])
        for i, term in enumerate(terms):
            total = sums[i]
            sums[i] = term if term is None or total is None else total.add_(term)
    return whole, sums[0], sums[1]


def layer_norm_gradients(
    dy: Tensor, x_hat: Tensor, scale: Tensor | None, needed: tuple[bool, bool, bool]
) -> Gradients:
    """dx / rstd, dscale and dbias (where needed) of LayerNorm, in one pass: x_hat is its own normalised input."""
    zeros = dy.new_zeros((*dy.shape[:-1], 1))
    # Where the scale is needed it is there; PyTorch's kernel wants one for the gradient of the bias too.
    bias = scale if scale is not None or not needed[2] else torch.ones_like(dy[(0,) * (dy.dim() - 1)])
    return torch.ops.aten.native_layer_norm_backward(
        dy.contiguous(), x_hat, dy.shape[-1:], zeros, zeros + 1, scale, bias, list(needed)
    )


def rms_norm_gradients(
    dy: Tensor, x_hat: Tensor, scale: Tensor | None, needed: tuple[bool, bool, bool]
) -> Gradients:
    """The same of RMSNorm."""
    rows = tuple(range(dy.dim() - 1))
    dx = dscale = dbias = None
    if needed[1]:
        dscale = (dy * x_hat).sum(rows)
    if needed[2]:
        dbias = dy.sum(rows)
    if needed[0]:
        g = dy if scale is None else dy * scale
        dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    return dx, dscale, dbias
