"""Attention without dropout, differentiated by its formula from queries, keys and values in a codec.

The backward pass needs the probabilities P only, never the output: with S = scale Q K^T + mask and P = softmax(S),

    dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale dS K,  dK = scale dS^T Q

five matrix products for a few rows of the batch at a time, where running the forward pass again and differentiating
that takes seven. PyTorch's fused kernels beat it on a GPU; on a CPU it beats them (docs/activations.md, Time).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.storing import SavedTensors

__all__ = ["plain_attention"]

# Scores at a time: one row of a batch of BERT-base at 128 tokens, which a second-level cache holds.
_SCORES = 1 << 18


def plain_attention(
    function: Callable[[], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    codec: Codec,
    value_codec: Codec | None,
) -> Tensor:
    """softmax(scale Q K^T + mask) V that keeps queries, keys and values in codecs.

    Args:
        function: computes the result `[batch, tokens, heads, width]`, which is returned as it is.
        query: [batch, heads, tokens, width].
        key: [batch, groups, tokens, width]; `heads` is a multiple of `groups`.
        value: as `key`.
        mask: boolean (true: attend) or additive without gradient, broadcastable to [batch, heads, tokens, tokens],
            or `None`; kept as it is.
        scale: factor of the scores.
        causal: each token attends to those up to itself.
        codec: stores queries and keys.
        value_codec: stores the values; `None`: they are kept as they are.
    """
    return _PlainAttention.apply(query, key, value, function, mask, scale, causal, codec, value_codec)


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, function, mask, scale, causal, codec, value_codec):
        saved = SavedTensors()
        saved.add_all((query, key, value), (codec, codec, value_codec))
        if mask is not None:
            saved.add(mask)
        ctx.records, ctx.scale, ctx.causal = saved.records, scale, causal
        ctx.save_for_backward(*saved.tensors)
        return function()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, *masks = SavedTensors.restore(ctx.records, ctx.saved_tensors)
        gradient = gradient.to(value.dtype).transpose(1, 2)
        batch, heads, tokens, _ = query.shape
        groups, seen = key.shape[1:3]
        repeats = heads // groups
        mask = masks[0].expand(batch, heads, tokens, seen) if masks else None
        dquery, dkey, dvalue = (torch.empty_like(t) for t in (query, key, value))
        # As many rows as fit, or else as many groups of heads of one row.
        rows = max(_SCORES // (heads * tokens * seen), 1)
        step = groups if rows > 1 else max(_SCORES // (repeats * tokens * seen), 1)
        for row in range(0, batch, rows):
            for group in range(0, groups, step):
                few = slice(row, row + rows), slice(group, group + step)
                many = few[0], slice(group * repeats, (group + step) * repeats)
                allowed = None if mask is None else _by_group(mask[many], repeats)
                operands = _by_group(query[many], repeats), key[few], value[few]
                # Autocast, where a backward pass runs under it, would round the scores.
                with torch.autocast(query.device.type, enabled=False):
                    of_query, of_key, of_value = _gradients(
                        *operands, _by_group(gradient[many], repeats), allowed, ctx.scale, ctx.causal
                    )
                _by_group(dquery[many], repeats).copy_(of_query)
                dkey[few] = of_key
                dvalue[few] = of_value
        return dquery, dkey, dvalue, *([None] * 6)


def _by_group(tensor: Tensor, repeats: int) -> Tensor:
    """[rows, heads, ...] as [rows, groups, repeats, ...]."""
    return tensor.unflatten(1, (-1, repeats))


def _gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries [rows, groups, repeats, tokens, width], keys and values [rows, groups, tokens, width]."""
    repeats, dtype = query.shape[2], value.dtype
    # All heads of a group in one matrix: its keys and values are not repeated.
    query, gradient = (t.flatten(2, 3) for t in (query, gradient))
    # Scores of 16-bit operands stay in fp32: their rounding would be exponentiated.
    exact = dtype if dtype == torch.float64 else torch.float32
    scores = (query.to(exact) * scale) @ key.to(exact).transpose(-1, -2)
    p = _softmax(scores.unflatten(2, (repeats, -1)), mask, causal).flatten(2, 3)
    dvalue = p.to(dtype).transpose(-1, -2) @ gradient
    dp = (gradient @ value.transpose(-1, -2)).to(exact)
    dscores = torch._softmax_backward_data(dp, p, -1, exact).mul_(scale).to(dtype)
    # Under autocast rotary embeddings leave queries and keys wider than values.
    dquery = (dscores @ key.to(dtype)).unflatten(2, (repeats, -1))
    return dquery, dscores.transpose(-1, -2) @ query.to(dtype), dvalue


def _softmax(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Probabilities from scores [rows, groups, repeats, tokens, seen], which are overwritten."""
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
        scores.masked_fill_(~allowed, float("-inf"))
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores.add_(mask.to(scores.dtype))
    return scores.softmax(-1)
