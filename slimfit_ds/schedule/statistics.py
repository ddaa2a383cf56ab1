"""How much a unit learns in a step: the size of its update relative to its weights.

The paper's mean(|dW / W|) divides by zero where a weight is zero, and a single weight near zero outweighs a million others.
Here each element counts |dW| / max(|W|, |dW|): the same number wherever the update is smaller than the weight, at most 1
elsewhere, and no epsilon to tune. It is a sum over elements, so that ranks which hold shards of a unit can add up theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["of_units", "sum_of_move", "sum_of_update", "sums_of_moves", "sums_of_updates"]

# Elements at a time: on a CPU what the second-level cache holds, elsewhere a bound of the temporary memory.
_CPU_PIECE = 1 << 16
_DEVICE_PIECE = 1 << 25


def sum_of_update(update: Tensor, weight: Tensor) -> Tensor:
    """Return the sum of |dW| / max(|W|, |dW|), float32 `[]`.

    Args:
        update: dW `[n]`, float32.
        weight: W before it `[n]`, float32.
    """
    return torch.stack([_sum(dw, w) for dw, w in zip(_pieces(update), _pieces(weight), strict=True)]).sum()


def sums_of_updates(updates: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Return `sum_of_update` of each pair; on a device by calls whose number does not grow with that of the pairs."""
    if _runs_on_cpu(updates[0]):
        return [sum_of_update(*pair) for pair in zip(updates, weights, strict=True)]
    magnitudes = torch._foreach_abs(updates)
    wholes = torch._foreach_abs(weights)
    torch._foreach_maximum_(wholes, magnitudes)
    torch._foreach_clamp_min_(wholes, torch.finfo(torch.float32).tiny)
    torch._foreach_div_(magnitudes, wholes)
    return list(torch._foreach_norm(magnitudes, 1))


def sum_of_move(before: Tensor, after: Tensor) -> Tensor:
    """Return the same sum from a weight before and after an update, of any shape and floating dtype."""
    sums = []
    for old, new in zip(_pieces(before.flatten()), _pieces(after.flatten()), strict=True):
        weight = old.float()
        sums.append(_sum(new.float() - weight, weight))
    return torch.stack(sums).sum()


def sums_of_moves(before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
    """Return `sum_of_move` of each pair; on a device, what is small goes together."""
    if not before or _runs_on_cpu(before[0]):
        return [sum_of_move(*pair) for pair in zip(before, after, strict=True)]
    sums: list[Tensor] = []
    while len(sums) < len(before):
        first, elements, stop = len(sums), 0, len(sums)
        while stop < len(before) and (stop == first or elements + before[stop].numel() <= _DEVICE_PIECE):
            elements += before[stop].numel()
            stop += 1
        if stop == first + 1:
            sums.append(sum_of_move(before[first], after[first]))
            continue
        olds, news = (
            [torch.empty_like(t, dtype=torch.float32) for t in before[first:stop]] for _ in range(2)
        )
        torch._foreach_copy_(olds, before[first:stop])
        torch._foreach_copy_(news, after[first:stop])
        torch._foreach_sub_(news, olds)
        sums += sums_of_updates(news, olds)
    return sums


def _runs_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    return iter(flat.split(_CPU_PIECE if _runs_on_cpu(flat) else _DEVICE_PIECE))


def _sum(update: Tensor, weight: Tensor) -> Tensor:
    magnitude, whole = update.abs(), weight.abs()
    torch.maximum(whole, magnitude, out=whole)
    # The floor only matters where weight and update are both zero: there the share is 0 / tiny = 0.
    return magnitude.div_(whole.clamp_min_(torch.finfo(update.dtype).tiny)).sum()


def of_units(totals: Mapping[int, float], sizes: Mapping[int, int]) -> dict[int, float]:
    """Return the mean relative update of each active unit after a step.

    Args:
        totals: unit -> sum over all of its elements. A unit without one took no part in the forward pass of any rank: it
            did not move, its statistic is 0.
        sizes: unit -> elements, of every active unit whose learning rate is not 0. A rate of 0 (the first step of a
            warm-up) says nothing about how much a unit has to learn.
    """
    return {unit: totals.get(unit, 0.0) / max(numel, 1) for unit, numel in sizes.items()}
