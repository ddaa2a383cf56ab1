"""LayerNorm and RMSNorm that keep the normalised input x_hat in a codec instead of their input.

With y = scale * x_hat + bias and g = scale * dy, row by row (Ba et al. 2016; Zhang and Sennrich 2019):

    LayerNorm:  dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))
    RMSNorm:    dx = rstd * (g - x_hat * mean(g * x_hat))

and dscale = sum(dy * x_hat), dbias = sum(dy) over the rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations.codecs import Codec, Encoded
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.base import is_fake, stands_for_device
from slimfit_ds.activations.codecs.triton_support import runs_in_triton
from slimfit_ds.activations.ops.norm_rows import (
    decode_rows,
    encode_rows,
    gradients_of_rows,
    layer_norm_gradients,
    rms_norm_gradients,
)
from slimfit_ds.activations.storing import RECIPE, SHARED, Payload, SavedTensors

__all__ = ["NormKind", "compressed_norm"]


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
        """x_hat and the reciprocal deviation, both fp32 (fp64 for fp64), of x [..., hidden]: [..., hidden], [..., 1]."""
        x = x.to(_working_dtype(x))
        if self.centred:
            x_hat, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, self.eps)
            return x_hat, rstd
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * rstd, rstd


def _working_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def compressed_norm(
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    kind: NormKind,
    codec: Codec,
    recipe: bool = False,
) -> Tensor:
    """A norm layer whose backward pass sees x_hat through a codec.

    Args:
        forward: the layer itself; its result is returned as it is.
        x: [..., hidden].
        weight: [hidden] or `None`.
        bias: [hidden] or `None`.
        kind: what `forward` computes.
        codec: stores x_hat.
        recipe: let functions that store the result share the stored x_hat.
    """
    kept: list[Any] = []
    # DeepSpeed empties a partitioned parameter between uses, so keep its values.
    affine = [t.detach().clone() if hasattr(t, "ds_id") else t for t in (weight, bias) if t is not None]
    y = _Norm.apply(x, weight, bias, forward, kind, codec, affine, kept)
    if recipe and kept and y.requires_grad:
        (encoded,) = kept
        output = _NormOutput(
            (*encoded.tensors, *affine),
            dataclasses.replace(encoded, tensors=()),
            codec,
            kind.offset,
            weight is not None,
            bias is not None,
            y.dtype,
        )
        SHARED.remember(y.detach(), RECIPE, _FROM_X_HAT, output)
    return y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, forward, kind: NormKind, codec: Codec, affine, kept: list[Any]):
        y = forward(x)
        ctx.fused = _runs_fused(x, codec)
        if ctx.fused:
            encoded, rstd = _encode_fused(x, kind, codec)
        else:
            encoded, rstd = encode_rows(x, kind.statistics, codec)
        kept.append(encoded)
        saved = SavedTensors()
        saved.add_payload(Payload(codec, encoded, x.shape))
        saved.add(rstd)
        for tensor in affine:
            saved.add(tensor)
        ctx.records, ctx.kind, ctx.dtype = saved.records, kind, x.dtype
        ctx.has_weight = weight is not None
        ctx.save_for_backward(*saved.tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        if ctx.fused:
            return *_gradients_fused(ctx, dy), None, None, None, None, None
        payload, encoded = _payload(ctx)
        rstd, *affine = SavedTensors.restore(ctx.records[1:], ctx.saved_tensors)
        # In fp32, or fp64 with an fp64 x_hat; the offset of Gemma's norms would be lost in bf16.
        scale = affine[0].to(encoded.dtype) + ctx.kind.offset if ctx.has_weight else None
        formulas = layer_norm_gradients if ctx.kind.centred else rms_norm_gradients
        dx, dweight, dbias = gradients_of_rows(
            formulas, dy, encoded, payload.codec, rstd, scale, ctx.needs_input_grad[:3], ctx.dtype
        )
        if dweight is not None:
            dweight = dweight.to(affine[0].dtype)
        if dbias is not None:
            dbias = dbias.to(affine[-1].dtype)
        return dx, dweight, dbias, None, None, None, None, None


def _payload(ctx: Any) -> tuple[Payload, Encoded]:
    """How x_hat is stored, and what is stored."""
    record = ctx.records[0]
    kept = tuple(ctx.saved_tensors[: record.count])
    return record.payload, dataclasses.replace(record.payload.encoded, tensors=kept)


def _runs_fused(x: Tensor, codec: Codec) -> bool:
    """Whether one kernel normalises and packs: groups of integers, a power of two long, that do not cross rows.

    Fake tensors stand for a device with the kernels.
    """
    return (
        isinstance(codec, AbsmaxCodec)
        and codec.fits_kernels
        and x.shape[-1] % codec.group == 0
        and x.is_contiguous()
        and x.numel() > 0
        and (runs_in_triton(x) or (stands_for_device(x) and x.dtype != torch.float64))
    )


def _encode_fused(x: Tensor, kind: NormKind, codec: Codec) -> tuple[Encoded, Tensor]:
    """The payload of x_hat, as fp32, and the reciprocal deviation [..., 1]."""
    assert isinstance(codec, AbsmaxCodec)
    layout = codec.storage(x.numel(), torch.float32)
    codes, steps = (x.new_empty(n, dtype=dtype) for dtype, n in layout)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if not is_fake(x):
        from slimfit_ds.activations.ops.triton_norm import encode_norm

        encode_norm(
            x.view(-1, x.shape[-1]),
            codes,
            steps,
            rstd,
            centred=kind.centred,
            eps=kind.eps,
            grid=codec.grid,
            group=codec.group,
        )
    return Encoded((codes, steps), x.shape, torch.float32), rstd


def _gradients_fused(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dscale and dbias, where needed, without writing x_hat out."""
    codes, steps, rstd, *affine = ctx.saved_tensors
    kind, codec = ctx.kind, ctx.records[0].payload.codec
    to_input, to_scale, to_bias = ctx.needs_input_grad[:3]
    dx = torch.empty_like(dy, dtype=ctx.dtype, memory_format=torch.contiguous_format) if to_input else None
    dy = dy.contiguous().view(-1, dy.shape[-1])
    sums = dy.new_empty((to_scale + to_bias, dy.shape[-1]), dtype=torch.float32)
    if not is_fake(dy):
        stored = dy, codes, steps, rstd, affine[0] if ctx.has_weight else None
        rows = None if dx is None else dx.view_as(dy)
        how = {"centred": kind.centred, "offset": kind.offset, "grid": codec.grid, "group": codec.group}
        if to_scale or to_bias:
            from slimfit_ds.activations.ops.triton_norm_weights import norm_gradients

            sums = norm_gradients(*stored, rows, to_scale=to_scale, to_bias=to_bias, **how)
        elif rows is not None:
            from slimfit_ds.activations.ops.triton_norm import norm_gradient

            norm_gradient(*stored, rows, **how)
    dscale = sums[0].to(affine[0].dtype) if to_scale else None
    dbias = sums[-1].to(affine[-1].dtype) if to_bias else None
    return dx, dscale, dbias


@dataclasses.dataclass(frozen=True)
class _NormOutput:
    """How a norm's output follows from the stored x_hat; `tensors`: the payload, then scale and bias if any."""

    tensors: tuple[Tensor, ...]
    x_hat: Any
    codec: Codec
    offset: float
    has_weight: bool
    has_bias: bool
    dtype: torch.dtype


class _FromXHat:
    """Decodes a `_NormOutput` to the norm's output."""

    @staticmethod
    def decode(recipe: _NormOutput) -> Tensor:
        count = len(recipe.tensors) - recipe.has_weight - recipe.has_bias
        affine = list(recipe.tensors[count:])
        encoded = dataclasses.replace(recipe.x_hat, tensors=recipe.tensors[:count])
        weight = affine.pop(0).to(encoded.dtype) + recipe.offset if recipe.has_weight else None
        bias = affine.pop(0).to(encoded.dtype) if recipe.has_bias else None

        def output(x_hat: Tensor) -> Tensor:
            y = x_hat if weight is None else x_hat * weight
            return y if bias is None else y + bias

        return decode_rows(encoded, recipe.codec, recipe.dtype, output)


_FROM_X_HAT = _FromXHat()
