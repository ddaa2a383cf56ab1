"""LayerNorm and RMSNorm that keep the normalised input x_hat in a codec instead of their input.

With y = scale * x_hat + bias and g = scale * dy, row by row (Ba et al. 2016; Zhang and Sennrich 2019):

    LayerNorm:  dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
    RMSNorm:    dx = rstd * (g - x_hat * mean(g * x_hat))

and dscale = sum(dy * x_hat), dbias = sum(dy) over the rows. On a GPU one kernel normalises and packs, and one reads the packed
x_hat backward. Elsewhere some rows are worked on at a time, where the codec allows it: what is in fp32 is then a few MiB,
whatever the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations.codecs import Codec, Encoded
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.backend import backend_of, has_fused_kernels
from slimfit_ds.activations.saved_tensors import SHARED, Payload, Rebuilt, SavedTensors

__all__ = ["NormKind", "compressed_norm"]

_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclasses.dataclass(frozen=True)
class NormKind:
    """Which normalisation a module computes.

    Attributes:
        centred: the mean is subtracted (LayerNorm); otherwise RMSNorm.
        eps: added to the variance or mean square.
        offset: the scale is `offset + weight`: 0, or 1 for Gemma's RMSNorm.
    """

    centred: bool
    eps: float
    offset: float = 0.0

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_hat [..., hidden] and the reciprocal deviation [..., 1] of x, both fp32 (fp64 for fp64)."""
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if self.centred:
            x_hat, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, self.eps)
            return x_hat, rstd
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * rstd, rstd


def compressed_norm(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: NormKind,
    codec: Codec,
    share: bool = False,
) -> Tensor:
    """Apply a norm layer whose backward pass sees x_hat through a codec.

    Args:
        forward: the layer itself; its result is returned as it is.
        x: [..., hidden].
        weight: [hidden] or `None`.
        bias: [hidden] or `None`.
        kind: what `forward` computes.
        codec: stores x_hat.
        share: let operations that keep the result compute it from the stored x_hat.
    """
    # DeepSpeed empties a partitioned parameter between uses, so keep its values.
    affine = [t.detach().clone() if hasattr(t, "ds_id") else t for t in (weight, bias) if t is not None]
    kept: list[Encoded] = []
    y = _Norm.apply(x, weight, bias, forward, kind, codec, affine, kept)
    if share and y.requires_grad:
        stored = Payload(codec, kept[0], x.shape)
        build = functools.partial(
            _output, stored.with_tensors(()), kind.offset, weight is not None, bias is not None, y.dtype
        )
        SHARED.remember_rebuilt(y, Rebuilt((*stored.tensors, *affine), build))
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, forward, kind: NormKind, codec: Codec, affine, kept: list[Encoded]):
        y = _by_rows(forward, x)
        ctx.fused = _packs_in_kernel(x, codec)
        if ctx.fused:
            assert isinstance(codec, AbsmaxCodec)
            encoded, rstd = _encode_in_kernel(x, kind, codec)
        else:
            encoded, rstd = _encode_rows(x, kind, codec)
        kept.append(encoded)
        saved = SavedTensors()
        saved.add_payload(Payload(codec, encoded, x.shape))
        for tensor in (rstd, *affine):
            saved.add(tensor)
        ctx.records, ctx.kind, ctx.dtype = saved.records, kind, x.dtype
        ctx.has_weight = weight is not None
        ctx.save_for_backward(*saved.tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # Once: torch's checkpointing lets what it has made again be read a single time.
        tensors = ctx.saved_tensors
        stored = ctx.records[0].payload_of(tensors)
        rstd, *affine = SavedTensors.restore(ctx.records[1:], tensors)
        gradients = _gradients_in_kernel if ctx.fused else _gradients_of_rows
        weight = affine[0] if ctx.has_weight else None
        dx, dweight, dbias = gradients(
            dy, stored, rstd, weight, ctx.kind, ctx.needs_input_grad[:3], ctx.dtype
        )
        if dweight is not None:
            dweight = dweight.to(affine[0].dtype)
        if dbias is not None:
            dbias = dbias.to(affine[-1].dtype)
        return dx, dweight, dbias, None, None, None, None, None


_ELEMENTS = 1 << 24
"""Of a part of a norm's input: a norm in fp32 takes several times as much."""


def _by_rows(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `forward(x)` of a function of each row [..., hidden], made part by part."""
    width = x.shape[-1]
    if x.numel() <= _ELEMENTS or not x.is_contiguous():
        return forward(x)
    rows = x.view(-1, width)
    size = max(_ELEMENTS // width, 1)
    first = forward(rows[:size])
    y = torch.empty(rows.shape, dtype=first.dtype, device=x.device)
    y[:size] = first
    for start in range(size, len(rows), size):
        y[start : start + size] = forward(rows[start : start + size])
    return y.view(x.shape)


def _encode_rows(x: Tensor, kind: NormKind, codec: Codec) -> tuple[Encoded, Tensor]:
    """Return what `codec` keeps of x_hat, and the reciprocal deviation [..., 1]."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    parts = codec.row_parts(len(rows), width)
    deviations: dict[int, Tensor] = {}

    def x_hat(index: int) -> Tensor:
        values, deviations[index] = kind.statistics(rows[slice(*parts[index])])
        return values

    # Of four dimensions codecs take the second one for heads; of a map [batch, height, width, hidden] it is not.
    encoded = codec.encode_parts(x_hat, len(parts), x.shape if x.dim() < 4 else rows.shape)
    rstd = deviations[0] if len(parts) == 1 else torch.cat([deviations[i] for i in range(len(parts))])
    return encoded, rstd.view(*x.shape[:-1], 1)


def _gradients_of_rows(
    dy: Tensor,
    stored: Payload,
    rstd: Tensor,
    weight: Tensor | None,
    kind: NormKind,
    needed: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> _Gradients:
    """Return dx in `dtype`, and the gradients of scale and bias in the dtype of x_hat, those that are needed."""
    encoded, codec = stored.encoded, stored.codec
    formulas = _layer_norm_gradients if kind.centred else _rms_norm_gradients
    # In fp32, or fp64 with an fp64 x_hat; the offset of Gemma's norms would be lost in bf16.
    scale = None if weight is None else weight.to(encoded.dtype) + kind.offset
    width = dy.shape[-1]
    flat, rstd = dy.reshape(-1, width), rstd.view(-1, 1)
    parts = codec.row_parts(len(flat), width)
    whole: Tensor | None = None
    if needed[0] and len(parts) > 1:
        whole = torch.empty(flat.shape, dtype=dtype, device=dy.device)
    sums: list[Tensor | None] = [None, None]
    for start, stop in parts:
        x_hat = codec.decode(codec.part(encoded, start, stop)).view(-1, width)
        dx, *terms = formulas(flat[start:stop].to(x_hat.dtype), x_hat, scale, needed)
        if dx is not None:
            dx = dx.mul_(rstd[start:stop])
            if whole is None:
                whole = dx.to(dtype)
            else:
                whole[start:stop] = dx
        for i, term in enumerate(terms):
            total = sums[i]
            sums[i] = term if term is None or total is None else total.add_(term)
    return None if whole is None else whole.view(dy.shape), sums[0], sums[1]


def _output(
    stored: Payload, offset: float, has_weight: bool, has_bias: bool, dtype: torch.dtype, *tensors: Tensor
) -> Tensor:
    """Return the output of a norm again, from what is stored of x_hat, then scale and bias if any."""
    count = len(tensors) - has_weight - has_bias
    encoded, codec = stored.with_tensors(tensors[:count]).encoded, stored.codec
    weight = tensors[count].to(encoded.dtype) + offset if has_weight else None
    bias = tensors[-1].to(encoded.dtype) if has_bias else None
    width = encoded.shape[-1]
    parts = codec.row_parts(encoded.shape[:-1].numel(), width)
    whole: Tensor | None = None
    for start, stop in parts:
        y = codec.decode(codec.part(encoded, start, stop)).view(-1, width)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        if len(parts) == 1:
            return y.to(dtype).view(stored.shape)
        whole = torch.empty(stored.shape, dtype=dtype, device=y.device) if whole is None else whole
        whole.view(-1, width)[start:stop] = y
    assert whole is not None
    return whole


def _layer_norm_gradients(
    dy: Tensor, x_hat: Tensor, scale: Tensor | None, needed: tuple[bool, bool, bool]
) -> _Gradients:
    """Return dx / rstd, dscale and dbias (where needed) of LayerNorm, in one pass: x_hat is its own normalised input."""
    zeros = dy.new_zeros((*dy.shape[:-1], 1))
    # Where the scale is needed it is there; PyTorch's kernel wants one for the gradient of the bias too.
    bias = scale if scale is not None or not needed[2] else torch.ones_like(dy[(0,) * (dy.dim() - 1)])
    return torch.ops.aten.native_layer_norm_backward(
        dy.contiguous(), x_hat, dy.shape[-1:], zeros, zeros + 1, scale, bias, list(needed)
    )


def _rms_norm_gradients(
    dy: Tensor, x_hat: Tensor, scale: Tensor | None, needed: tuple[bool, bool, bool]
) -> _Gradients:
    """Return the same of RMSNorm."""
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


def _packs_in_kernel(x: Tensor, codec: Codec) -> bool:
    """Return whether one kernel normalises and packs: groups of integers, a power of two long, that do not cross rows."""
    return (
        isinstance(codec, AbsmaxCodec)
        and codec.fits_kernels
        and x.shape[-1] % codec.group == 0
        and x.is_contiguous()
        and has_fused_kernels(x)
    )


def _encode_in_kernel(x: Tensor, kind: NormKind, codec: AbsmaxCodec) -> tuple[Encoded, Tensor]:
    """Do as `_encode_rows`, in one kernel."""
    layout = codec.storage(x.numel(), torch.float32)
    kept = tuple(x.new_empty(n, dtype=dtype) for dtype, n in layout)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if backend_of(x) != "none":
        from slimfit_ds.activations.ops.triton_norm import encode_norm

        encode_norm(x.view(-1, x.shape[-1]), kept, rstd, kind, codec)
    return Encoded(kept, x.shape, torch.float32), rstd


def _gradients_in_kernel(
    dy: Tensor,
    stored: Payload,
    rstd: Tensor,
    weight: Tensor | None,
    kind: NormKind,
    needed: tuple[bool, bool, bool],
    dtype: torch.dtype,
) -> _Gradients:
    """Do as `_gradients_of_rows`, without writing x_hat out."""
    to_input, to_scale, to_bias = needed
    dx = torch.empty_like(dy, dtype=dtype, memory_format=torch.contiguous_format) if to_input else None
    dy = dy.contiguous().view(-1, dy.shape[-1])
    sums = dy.new_empty((to_scale + to_bias, dy.shape[-1]), dtype=torch.float32)
    if backend_of(dy) != "none":
        from slimfit_ds.activations.ops.triton_norm import norm_gradients

        rows = None if dx is None else dx.view_as(dy)
        sums = norm_gradients(dy, stored.tensors, rstd, weight, rows, to_scale, to_bias, kind, stored.codec)
    return dx, sums[0] if to_scale else None, sums[-1] if to_bias else None
