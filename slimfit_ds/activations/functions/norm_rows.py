"""x_hat of a norm and its gradients for some rows at a time, where the codec allows it.

Rows are independent, so only the sums over them (the gradients of scale and bias) are rounded in another order than
for all rows at once. What is worked on in fp32 is then a few MiB, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec, Encoded
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.rows import row_bounds

__all__ = ["Gradients", "encode_rows", "gradients_of_rows", "layer_norm_gradients", "rms_norm_gradients"]

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of a norm's input, scale and bias, each where it is needed."""


def encode_rows(
    x: Tensor, statistics: Callable[[Tensor], tuple[Tensor, Tensor]], codec: Codec
) -> tuple[Encoded, Tensor]:
    """The payload of x_hat and the reciprocal deviation [..., 1], bit for bit as for all rows at once.

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
    assert isinstance(codec, AbsmaxCodec)
    parts, deviations = [], []
    for start, stop in bounds:
        x_hat, rstd = statistics(flat[start:stop])
        parts.append(codec.encode(x_hat))
        deviations.append(rstd)
    return codec.join(parts, x.shape), torch.cat(deviations).view(*x.shape[:-1], 1)


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
    assert isinstance(codec, AbsmaxCodec)
    flat, rstd = dy.reshape(-1, width), rstd.view(-1, 1)
    whole = torch.empty(dy.shape, dtype=dtype, device=dy.device) if needed[0] else None
    sums: list[Tensor | None] = [None, None]
    for start, stop in bounds:
        x_hat = codec.decode(codec.part(encoded, start * width, stop * width)).view(-1, width)
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
