"""Splitting the arguments of a function into chunks of the batch, and its results back together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Chunks", "Merged", "plan_chunks"]


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


class Merged:
    """Results of the whole batch, filled in chunk by chunk, so that no chunk's own result outlives it.

    A tensor with a row for each sample of its chunk is joined; of anything else the first chunk's is kept.

    Args:
        plan: the chunks.
    """

    def __init__(self, plan: Chunks):
        self._plan = plan
        self._joins: list[bool] = []
        self.values: list[Any] = []

    @property
    def by_row(self) -> bool:
        """Whether every tensor so far has a row for each sample, or there is one chunk only."""
        return len(self._plan) == 1 or all(
            joins or not isinstance(value, Tensor)
            for value, joins in zip(self.values, self._joins, strict=True)
        )

    def add(self, index: int, results: Sequence[Any]) -> None:
        """Take in the results of chunk `index`; the chunks come in order.

        Raises:
            ValueError: results of two chunks differ in more than their rows.
        """
        start, stop = self._plan.bounds[index]
        if not index:
            self._joins = [len(self._plan) > 1 and _has_rows(v, stop - start) for v in results]
            self.values = [
                v.new_empty((self._plan.batch, *v.shape[1:])) if joins else v
                for v, joins in zip(results, self._joins, strict=True)
            ]
        for i, value in enumerate(results):
            if not self._joins[i]:
                continue
            whole = self.values[i]
            if not _has_rows(value, stop - start):
                # Its length was that of the first chunk by chance.
                self._joins[i], self.values[i] = False, whole[: self._plan.bounds[0][1]]
                continue
            if value.shape[1:] != whole.shape[1:]:
                raise ValueError(
                    f"results of two chunks differ: shapes {[*whole.shape[1:]]} and {[*value.shape[1:]]} of a sample"
                )
            whole[start:stop] = value


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


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
