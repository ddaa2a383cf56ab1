"""Attention differentiated by its formula from queries, keys and values in a codec, with or without dropout.

The backward pass needs the probabilities P only, never the output: with S = scale Q K^T + mask, P = softmax(S) and a
dropout mask M of 0 and 1 / (1 - p), which is made again rather than kept (`attention_dropout`),

    dV = (M * P)^T dO,  dP = M * dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = scale dS K,  dK = scale dS^T Q

five matrix products for a few rows of the batch at a time, where running the forward pass again and differentiating
that takes seven. PyTorch's fused kernels beat it on a GPU; on a CPU it beats them (docs/activations.md, Time).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.ops.attention_dropout import (
    NOTHING_DROPPED,
    AttentionMask,
    DrawMask,
    replayed_mask,
)
from slimfit_ds.activations.ops.attention_heads import Heads
from slimfit_ds.activations.storing import SavedTensors

__all__ = ["plain_attention"]


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
    dropout: float = 0.0,
    draw: DrawMask = replayed_mask,
) -> Tensor:
    """dropout(softmax(scale Q K^T + mask)) V that keeps queries, keys and values in codecs.

    Args:
        function: computes the result `[batch, tokens, heads, width]`, which is returned as it is. With dropout, whose
            mask has to be known, the result is computed here instead.
        query: [batch, heads, tokens, width].
        key: [batch, groups, tokens, width]; `heads` is a multiple of `groups`.
        value: as `key`.
        mask: boolean (true: attend) or additive without gradient, broadcastable to [batch, heads, tokens, tokens],
            or `None`; kept as it is. A token that may attend to nothing gets zeros, as in PyTorch.
        scale: factor of the scores.
        causal: each token attends to those up to itself.
        codec: stores queries and keys.
        value_codec: stores the values; `None`: they are kept as they are.
        dropout: the probability with which each one of P is set to zero.
        draw: draws the mask for that.
    """
    return _PlainAttention.apply(
        query, key, value, function, mask, scale, causal, codec, value_codec, dropout, draw
    )


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, function, mask, scale, causal, codec, value_codec, dropout, draw: DrawMask
    ):
        saved = SavedTensors()
        saved.add_all((query, key, value), (codec, codec, value_codec))
        if mask is not None:
            saved.add(mask)
        ctx.records, ctx.scale, ctx.causal = saved.records, scale, causal
        ctx.save_for_backward(*saved.tensors)
        if not dropout:
            ctx.dropped = lambda: NOTHING_DROPPED
            return function()
        dropped, ctx.dropped = draw(query, (*query.shape[:3], key.shape[2]), dropout)
        kind = query.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
        heads = Heads.of(query, key, mask, scale, causal)
        with torch.autocast(kind, enabled=False):
            return _output(heads, value.to(dtype), dropped)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, *masks = SavedTensors.restore(ctx.records, ctx.saved_tensors)
        heads = Heads.of(query, key, masks[0] if masks else None, ctx.scale, ctx.causal)
        # Autocast, where a backward pass runs under it, would round the scores.
        with torch.autocast(query.device.type, enabled=False):
            found = _gradients(heads, value, gradient.to(value.dtype).transpose(1, 2), ctx.dropped())
        return *found, *([None] * 8)


def _output(heads: Heads, value: Tensor, dropped: AttentionMask) -> Tensor:
    """The result of attention [batch, tokens, heads, width]."""
    batch, count, tokens, _ = heads.query.shape
    output = value.new_empty(batch, tokens, count, value.shape[3])
    for piece in heads.pieces():
        p = heads.probabilities(piece)
        kept = dropped.drop(p.flatten(0, 2), piece.first, value.dtype).view_as(p)
        result = kept.flatten(2, 3) @ piece.of_groups(value)
        piece.of_heads(output.transpose(1, 2)).copy_(result.unflatten(2, (piece.repeats, -1)))
    return heads.without_blind(output.transpose(1, 2)).transpose(1, 2)


def _gradients(
    heads: Heads, value: Tensor, gradient: Tensor, dropped: AttentionMask
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values from that of the result [batch, heads, tokens, width]."""
    query, key, dtype = heads.query, heads.key, value.dtype
    dquery, dkey, dvalue = (torch.empty_like(t) for t in (query, key, value))
    gradient = heads.without_blind(gradient)
    for piece in heads.pieces():
        p = heads.probabilities(piece)
        # All heads of a group in one matrix: its keys and values are not repeated.
        of_output = piece.of_heads(gradient).flatten(2, 3)
        dp = (of_output @ piece.of_groups(value).transpose(-1, -2)).view_as(p)
        found = dropped.gradient(p.flatten(0, 2), dp.flatten(0, 2), piece.first, heads.scale)
        kept, dscores = (t.view_as(p).flatten(2, 3) for t in found)
        piece.of_groups(dvalue).copy_(kept.transpose(-1, -2) @ of_output)
        # Under autocast rotary embeddings leave queries and keys wider than values.
        of_query = dscores @ piece.of_groups(key).to(dtype)
        piece.of_heads(dquery).copy_(of_query.unflatten(2, (piece.repeats, -1)))
        piece.of_groups(dkey).copy_(dscores.transpose(-1, -2) @ piece.of_heads(query).flatten(2, 3).to(dtype))
    return dquery, dkey, dvalue
