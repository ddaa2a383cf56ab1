"""Splitting the arguments of a function into chunks of the batch, and its results back together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Chunks", "plan_chunks"]


@dataclass(frozen=True)
class Chunks:
    """Row ranges of the batch, and which arguments have a row for each sample.

    Attributes:
        batch: rows of the whole batch.
        bounds: first row and end of each chunk.
        divided: for each argument, whether it is split.
    """

    batch: int
    bounds: tuple[tuple[int, int], ...]
    divided: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.bounds)

    def undivided(self) -> Chunks:
        """The same arguments in one chunk."""
        return Chunks(self.batch, ((0, self.batch),), (False,) * len(self.divided))

    def slice(self, tensors: Sequence[Tensor], index: int) -> list[Tensor]:
        """The arguments of one chunk."""
        start, stop = self.bounds[index]
        return [t[start:stop] if split else t for t, split in zip(tensors, self.divided, strict=True)]

    def is_batched(self, whole: Tensor) -> bool:
        """Whether a result of the whole batch has a row for each sample."""
        return whole.dim() > 0 and whole.shape[0] == self.batch

    def merge(self, results: Sequence[Sequence[Any]]) -> list[Any]:
        """Results of the whole batch from those of the chunks; what has no batch dimension is the first chunk's."""
        return [self._merge_one(column) for column in zip(*results, strict=True)]

    def _merge_one(self, column: tuple[Any, ...]) -> Any:
        rows = [stop - start for start, stop in self.bounds]
        by_sample = (
            all(isinstance(v, Tensor) and v.dim() > 0 for v in column)
            and [v.shape[0] for v in column] == rows
        )
        return torch.cat(column) if by_sample else column[0]


def plan_chunks(tensors: Sequence[Tensor], chunk_tokens: int | None) -> Chunks:
    """Chunks of about `chunk_tokens` tokens.

    The first floating-point tensor is the hidden state. Only one of rank three or more, `[batch, tokens, hidden]`,
    is split: rows of a matrix may be tokens of one packed sequence that attend to each other.

    Args:
        tensors: the arguments of a function.
        chunk_tokens: target size of a chunk in tokens; `None`: one chunk.

    Raises:
        ValueError: `chunk_tokens` is not positive.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be a positive number of tokens or None, got {chunk_tokens}")
    hidden = next((t for t in tensors if t.is_floating_point() and t.dim() >= 2), None)
    if hidden is None:
        return Chunks(1, ((0, 1),), (False,) * len(tensors))
    batch = hidden.shape[0]
    whole = Chunks(batch, ((0, batch),), (False,) * len(tensors))
    if chunk_tokens is None or hidden.dim() < 3 or batch < 2 or not hidden.numel():
        return whole
    tokens = hidden.numel() // hidden.shape[-1]
    rows = max(1, chunk_tokens * batch // tokens)
    # A [sequence, ...] table cannot be told from a [batch, ...] one when both lengths agree.
    ambiguous = batch == hidden.shape[1] and any(t.dim() == 2 and t.shape[0] == batch for t in tensors)
    if rows >= batch or ambiguous:
        return whole
    bounds = tuple((start, min(start + rows, batch)) for start in range(0, batch, rows))
    return Chunks(batch, bounds, tuple(t.dim() >= 2 and t.shape[0] == batch for t in tensors))
