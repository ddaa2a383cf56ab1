"""Attention that keeps queries, keys and values in a codec and computes the softmax again.

The softmax statistics are recomputed from the decoded queries and keys: mixing them with the exact ones of the
forward pass would leave probabilities that do not add up to one (measured: 10 to 30 times the gradient error).
`stored_probabilities` keeps the softmax output too, as Ardakani et al. 2023 do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations.checkpoint import checkpoint
from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.saved_tensors import SavedTensors

__all__ = ["recomputed_attention", "stored_probabilities"]


def recomputed_attention(
    function: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    codec: Any,
    value_codec: Codec | bool = True,
    chunk_tokens: int | None = None,
    **kwargs: Any,
) -> Any:
    """`function(query, key, value, *args, **kwargs)` that keeps its first three arguments in codecs.

    Args:
        function: any attention on `[batch, heads, tokens, width]`, with masks and dropout of its own.
        query: [batch, heads, tokens, width].
        key: [batch, heads or groups, tokens, width].
        value: as `key`.
        args: mask and the like, kept as they are.
        codec: as in `checkpoint`.
        value_codec: of the values; `True`: as the rest, `False`: none.
        chunk_tokens: as in `checkpoint`; tokens, not tokens times heads.
        kwargs: more arguments of `function`.
    """
    chunk = None if chunk_tokens is None else chunk_tokens * query.shape[1]
    return checkpoint(
        function,
        query,
        key,
        value,
        *args,
        codec=codec,
        chunk_tokens=chunk,
        select=functools.partial(_first_three, value_codec),
        **kwargs,
    )


def _first_three(values: Codec | bool, tensors: Sequence[Tensor]) -> list[Codec | bool]:
    return [True, True, values, *[False] * (len(tensors) - 3)]


def stored_probabilities(
    function: Callable[[], Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    codec: Codec,
    value_codec: Codec | None,
    probability_codec: Codec,
) -> Tensor:
    """Attention without dropout whose backward pass uses stored softmax outputs.

    Args:
        function: computes the result `[batch, tokens, heads, width]`, which is returned as it is.
        query: [batch, heads, tokens, width].
        key: [batch, groups, tokens, width].
        value: as `key`.
        mask: boolean (true: attend) or additive, broadcastable to [batch, heads, tokens, tokens], or `None`.
        scale: factor of the scores.
        causal: each token attends to those up to itself.
        codec: stores queries and keys.
        value_codec: stores the values; `None`: they are kept as they are.
        probability_codec: stores the softmax output; it must represent 0.
    """
    return _StoredProbabilities.apply(
        query, key, value, function, mask, scale, causal, codec, value_codec, probability_codec
    )


class _StoredProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, function, mask, scale, causal, codec, value_codec, probability_codec):
        repeats = query.shape[1] // key.shape[1]
        scores = query.float() @ key.float().repeat_interleave(repeats, 1).transpose(-1, -2) * scale
        if causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, float("-inf"))
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask.to(scores.dtype)
        saved = SavedTensors()
        for tensor, how in ((query, codec), (key, codec), (value, value_codec)):
            saved.add(tensor, how)
        saved.add(scores.softmax(-1), probability_codec)
        ctx.records, ctx.scale, ctx.repeats = saved.records, scale, repeats
        ctx.save_for_backward(*saved.tensors)
        return function()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, p = SavedTensors.restore(ctx.records, ctx.saved_tensors)
        dtype, groups = query.dtype, key.shape[1]
        gradient = gradient.transpose(1, 2).float()
        wide_key, wide_value = (t.float().repeat_interleave(ctx.repeats, 1) for t in (key, value))
        dvalue = p.transpose(-1, -2) @ gradient
        dp = gradient @ wide_value.transpose(-1, -2)
        dscores = p * (dp - (dp * p).sum(-1, keepdim=True)) * ctx.scale
        dquery = dscores @ wide_key
        dkey = dscores.transpose(-1, -2) @ query.float()
        dkey, dvalue = (t.unflatten(1, (groups, ctx.repeats)).sum(2) for t in (dkey, dvalue))
        return dquery.to(dtype), dkey.to(dtype), dvalue.to(dtype), *([None] * 7)
