"""Which layers to assume active in an estimate: memory depends on it, because an embedding is one layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from slimfit_ds.schedule.policies import Budget
from slimfit_ds.trainable.units import Unit

__all__ = ["ACTIVE_SETS", "choose_active"]

_GOLDEN = 0.6180339887498949


def _by_size(layers: Sequence[Unit], free: Collection[int]) -> list[int]:
    # Of equal weights the later ones: in a feed-forward pair the second keeps the wider input.
    return sorted(free, key=lambda i: (layers[i].numel, i), reverse=True)


def expected(layers: Sequence[Unit], free: Collection[int], budget: Budget) -> Collection[int]:
    """Layers at evenly spaced ranks of size: about the bytes of a random draw, the same every time."""
    order = _by_size(layers, free)
    mixed = sorted(range(len(order)), key=lambda rank: (rank * _GOLDEN) % 1)
    filled = budget.fill(order[rank] for rank in mixed)
    spaced = [order[int((i + 0.5) * len(order) / len(filled))] for i in range(len(filled))]
    # Layers of unlike cost: as many at even ranks may cost more than the budget allows.
    return spaced if budget.fits(spaced) else filled


def worst(layers: Sequence[Unit], free: Collection[int], budget: Budget) -> Collection[int]:
    """The largest layers that fit."""
    return budget.fill(_by_size(layers, free))


ACTIVE_SETS: dict[str, Callable[[Sequence[Unit], Collection[int], Budget], Collection[int]]] = {
    "expected": expected,
    "worst": worst,
}


def choose_active(layers: Sequence[Unit], free: Collection[int], budget: Budget, kind: str) -> list[str]:
    """The names of the layers assumed active, in model order.

    Args:
        layers: all freezable layers of the model, in model order.
        free: positions of those that may train.
        budget: of the freezing rate, over all layers.
        kind: `expected` or `worst`.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ACTIVE_SETS:
        raise ValueError(f"active must be one of {', '.join(ACTIVE_SETS)}, got {kind!r}")
    return [layers[i].name for i in sorted(ACTIVE_SETS[kind](layers, free, budget))]
