"""Dropout of attention's probabilities: the same ones dropped forward and backward, without a mask that is kept.

A mask is drawn for probabilities [batch, heads, tokens, seen] and applied to some matrices [tokens, seen] at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from slimfit_ds.activations import rng
from slimfit_ds.activations.ops.cpu_dropout import CpuMask, converts, drop, runs_in_c, softmax_gradient

__all__ = ["NOTHING_DROPPED", "AttentionMask", "DrawMask", "mask_drawing", "replayed_mask"]


class AttentionMask(Protocol):
    """Which probabilities stay, and the gradient of the softmax under that."""

    def drop(self, p: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        """What the mask leaves of probabilities, scaled.

        Args:
            p: some matrices [matrices, tokens, seen], contiguous; fp32 or fp64.
            first: number of the first one among batch times heads.
            dtype: of the result.
        """

    def gradient(self, p: Tensor, dp: Tensor, first: int, scale: float) -> tuple[Tensor, Tensor]:
        """What `drop` leaves, and the gradient of the scores.

        Args:
            p: as in `drop`.
            dp: the gradient of what `drop` leaves, as `p`, in any dtype; may be overwritten.
            first: as in `drop`.
            scale: factor of the scores.

        Returns:
            Both as `dp`.
        """


DrawMask = Callable[[Tensor, tuple[int, ...], float], tuple[AttentionMask, Callable[[], AttentionMask]]]
"""From an operand of the attention, the shape of the probabilities and p: a new mask, and how to get it again."""


@dataclass(frozen=True)
class _Nothing:
    """Everything stays."""

    def drop(self, p: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        return p.to(dtype)

    def gradient(self, p: Tensor, dp: Tensor, first: int, scale: float) -> tuple[Tensor, Tensor]:
        if runs_in_c(p):
            return _in_c(p, dp, None, scale)
        return p.to(dp.dtype), _of_scores(p, dp.to(p.dtype), scale).to(dp.dtype)


NOTHING_DROPPED = _Nothing()


@dataclass(frozen=True)
class _Counted:
    """A mask that is made in C wherever it is needed, from a seed and the position."""

    mask: CpuMask

    def drop(self, p: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty_like(p, dtype=dtype if converts(p.dtype, dtype) else p.dtype)
        drop(p, out, self._from(p, first), p.shape[0])
        return out.to(dtype)

    def gradient(self, p: Tensor, dp: Tensor, first: int, scale: float) -> tuple[Tensor, Tensor]:
        return _in_c(p, dp, self._from(p, first), scale)

    def _from(self, p: Tensor, first: int) -> CpuMask:
        return self.mask.after(first, p[0].numel())


@dataclass(frozen=True)
class _Factors:
    """A mask as it was drawn: 0 or 1 / (1 - p), [matrices, tokens, seen]."""

    factors: Tensor

    def drop(self, p: Tensor, first: int, dtype: torch.dtype) -> Tensor:
        return (p * self._of(p, first)).to(dtype)

    def gradient(self, p: Tensor, dp: Tensor, first: int, scale: float) -> tuple[Tensor, Tensor]:
        factors = self._of(p, first)
        return self.drop(p, first, dp.dtype), _of_scores(p, dp * factors, scale).to(dp.dtype)

    def _of(self, p: Tensor, first: int) -> Tensor:
        return self.factors[first : first + p.shape[0]]


def replayed_mask(
    operand: Tensor, shape: tuple[int, ...], p: float
) -> tuple[AttentionMask, Callable[[], AttentionMask]]:
    """PyTorch's own mask for all probabilities at once, drawn again from the state of the generators before it."""
    device, dtype = operand.device, torch.promote_types(operand.dtype, torch.float32)
    state = rng.capture([operand])

    def drawn() -> AttentionMask:
        return _Factors(F.dropout(torch.ones(shape, dtype=dtype, device=device), p).flatten(0, 1))

    def again() -> AttentionMask:
        with rng.replay(state):
            return drawn()

    return drawn(), again


def _counted_mask(
    operand: Tensor, shape: tuple[int, ...], p: float
) -> tuple[AttentionMask, Callable[[], AttentionMask]]:
    """A mask made in C from a seed and the position, or else as `replayed_mask`."""
    if not (runs_in_c(operand) and CpuMask.takes(p)):
        return replayed_mask(operand, shape, p)
    mask = _Counted(CpuMask.draw(p))
    return mask, lambda: mask


def mask_drawing(way: Any) -> DrawMask:
    """How attention's masks are drawn for a value of the operation `dropout`."""
    return _counted_mask if way == "philox" else replayed_mask


def _in_c(p: Tensor, dp: Tensor, mask: CpuMask | None, scale: float) -> tuple[Tensor, Tensor]:
    dtype = dp.dtype
    dp = dp.to(dtype if converts(p.dtype, dtype) else p.dtype).contiguous()
    dropped = p if mask is None and p.dtype == dp.dtype else torch.empty_like(dp)
    softmax_gradient(p, dp, None if dropped is p else dropped, mask, scale)
    return dropped.to(dtype), dp.to(dtype)


def _of_scores(p: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """scale * p * (g - sum of p * g over a row)."""
    return torch._softmax_backward_data(gradient, p, -1, p.dtype).mul_(scale)
