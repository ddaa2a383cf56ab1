"""The probabilities of attention, for some heads at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Heads", "Piece"]

# Scores at a time: one row of a batch of BERT-base at 128 tokens, which a second-level cache holds.
_SCORES = 1 << 18


@dataclass(frozen=True)
class Piece:
    """All heads of some rows of the batch, or those of some groups of one row.

    Attributes:
        rows: of the batch.
        groups: of heads that share keys and values.
        repeats: heads of a group.
        first: number of the first head among batch times heads.
    """

    rows: slice
    groups: slice
    repeats: int
    first: int

    def of_groups(self, tensor: Tensor) -> Tensor:
        """These of a tensor [batch, groups, ...]."""
        return tensor[self.rows, self.groups]

    def of_heads(self, tensor: Tensor) -> Tensor:
        """These of a tensor [batch, heads, ...], as [rows, groups, repeats, ...]."""
        heads = slice(self.groups.start * self.repeats, self.groups.stop * self.repeats)
        return tensor[self.rows, heads].unflatten(1, (-1, self.repeats))


@dataclass(frozen=True)
class Heads:
    """What the probabilities softmax(scale Q K^T + mask) of all heads follow from.

    Attributes:
        query: [batch, heads, tokens, width].
        key: [batch, groups, seen, width]; `heads` is a multiple of `groups`.
        mask: boolean (true: attend) or additive and finite, [batch, heads, tokens, seen], or `None`.
        blind: broadcastable to [batch, heads, tokens, 1], true for tokens that may attend to nothing, whose probabilities
            here mean nothing; `None` without a mask.
        scale: factor of the scores.
        causal: each token attends to those up to itself.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    blind: Tensor | None
    scale: float
    causal: bool

    @classmethod
    def of(cls, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Heads:
        """With a mask as callers give it."""
        if mask is None:
            return cls(query, key, None, None, scale, causal)
        if mask.dtype == torch.bool:
            blind = ~mask.any(-1, keepdim=True)
        else:
            # Infinity would make the probabilities of a blind token NaN, which no product takes away again.
            blind = mask.amax(-1, keepdim=True).isneginf()
            mask = mask.clamp(min=max(torch.finfo(dtype).min for dtype in (mask.dtype, torch.float32)))
        return cls(query, key, mask.expand(*query.shape[:3], key.shape[2]), blind, scale, causal)

    def without_blind(self, tensor: Tensor) -> Tensor:
        """Zeros for blind tokens, as in PyTorch; `tensor` [batch, heads, tokens, ...] for the others."""
        return tensor if self.blind is None else tensor.masked_fill(self.blind, 0)

    def pieces(self) -> Iterator[Piece]:
        """As many rows of the batch as fit, or else as many groups of heads of one row."""
        batch, heads, tokens, _ = self.query.shape
        groups, seen = self.key.shape[1:3]
        repeats = heads // groups
        rows = max(_SCORES // (heads * tokens * seen), 1)
        step = groups if rows > 1 else max(_SCORES // (repeats * tokens * seen), 1)
        for row in range(0, batch, rows):
            for group in range(0, groups, step):
                few = slice(row, row + rows), slice(group, group + step)
                yield Piece(*few, repeats, row * heads + group * repeats)

    def probabilities(self, piece: Piece) -> Tensor:
        """[rows, groups, repeats, tokens, seen] in fp32, or fp64 for such queries; contiguous."""
        query, key = piece.of_heads(self.query), piece.of_groups(self.key)
        # Scores of 16-bit operands stay in fp32: their rounding would be exponentiated.
        exact = torch.promote_types(query.dtype, torch.float32)
        # All heads of a group in one matrix: its keys are not repeated.
        scores = (query.flatten(2, 3).to(exact) * self.scale) @ key.to(exact).transpose(-1, -2)
        scores = scores.unflatten(2, (piece.repeats, -1))
        if self.causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
            scores.masked_fill_(~allowed, float("-inf"))
        if self.mask is not None and self.mask.dtype == torch.bool:
            scores.masked_fill_(~piece.of_heads(self.mask), torch.finfo(exact).min)
        elif self.mask is not None:
            scores.add_(piece.of_heads(self.mask).to(exact))
        return scores.softmax(-1)
