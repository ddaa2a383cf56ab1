"""What a set of active layers may cost: the promise that a freezing rate makes, in one or more currencies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from slimfit_ds.trainable.layers import Layer

__all__ = ["COSTS", "Budget", "active_count", "room_at"]

COSTS: dict[str, Callable[[Layer], int]] = {
    "layers": lambda layer: 1,
    "parameters": lambda layer: layer.numel,
    "activations": lambda layer: layer.inputs,
    "flops": lambda layer: layer.numel if layer.inputs else 0,
}
"""Currency -> cost of training a layer for one step: one; its weights (gradient, states, traffic); the
elements of its input that the backward pass needs per position; the multiply-adds of its weight gradient per
position, which are none for what is looked up, added or multiplied element by element (embeddings, norms)."""


@dataclass(frozen=True)
class Budget:
    """Costs and limits of an active set, one entry for each currency.

    Args:
        costs: for each layer its costs.
        room: for each currency the most that a set may cost.
    """

    costs: tuple[tuple[int, ...], ...]
    room: tuple[int, ...]

    def fits(self, layers: Iterable[int]) -> bool:
        """Whether a set of layers keeps within every limit."""
        return all(spent <= limit for spent, limit in zip(self.spent(layers), self.room, strict=True))

    def spent(self, layers: Iterable[int]) -> tuple[int, ...]:
        """What a set of layers costs in each currency."""
        chosen = list(layers)
        return tuple(sum(self.costs[layer][k] for layer in chosen) for k in range(len(self.room)))

    def fill(self, ranking: Iterable[int], always: frozenset[int] = frozenset()) -> frozenset[int]:
        """`always`, then each layer of a ranking that still fits, best first."""
        chosen = set(always)
        left = [limit - spent for limit, spent in zip(self.room, self.spent(always), strict=True)]
        for layer in ranking:
            cost = self.costs[layer]
            if layer not in chosen and all(c <= r for c, r in zip(cost, left, strict=True)):
                chosen.add(layer)
                left = [r - c for c, r in zip(cost, left, strict=True)]
        return frozenset(chosen)


def active_count(n_layers: int, rate: float) -> int:
    """Layers that train at a freezing rate: all but `floor(rate * n_layers)`, and at least one."""
    # 0.29 * 100 is 28.999999999999996 in floating point; the user meant 29.
    return max(n_layers - math.floor(rate * n_layers + 1e-9), 1)


def room_at(layers: Sequence[Layer], currencies: Sequence[str], rate: float) -> Budget:
    """The budget of a freezing rate: at most `1 - rate` of what training all layers would cost.

    Args:
        layers: all freezable layers, never-active ones included.
        currencies: keys of `COSTS`. In `layers` the room is never below one layer.
        rate: share that is frozen, in [0, 1).
    """
    costs = tuple(tuple(COSTS[name](layer) for name in currencies) for layer in layers)
    room = tuple(
        active_count(len(layers), rate)
        if name == "layers"
        else math.floor((1 - rate) * sum(cost[k] for cost in costs) + 1e-6)
        for k, name in enumerate(currencies)
    )
    return Budget(costs, room)
