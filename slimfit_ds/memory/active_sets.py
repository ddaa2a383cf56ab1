"""Which layers to assume active in an estimate: memory depends on it, because an embedding is one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slimfit_ds.freezing.layers import Layer

__all__ = ["ACTIVE_SETS", "choose_active"]


def _by_size(layers: Sequence[Layer]) -> list[str]:
    # Of equal weights the later ones: in a feed-forward pair the second keeps the wider input.
    order = sorted(range(len(layers)), key=lambda i: (layers[i].numel, i), reverse=True)
    return [layers[i].name for i in order]


def expected(layers: Sequence[Layer], count: int) -> list[str]:
    """Layers at evenly spaced ranks of size: about the bytes of a random draw, the same every time."""
    order = _by_size(layers)
    return [order[int((i + 0.5) * len(order) / count)] for i in range(count)]


def worst(layers: Sequence[Layer], count: int) -> list[str]:
    """The largest layers."""
    return _by_size(layers)[:count]


ACTIVE_SETS: dict[str, Callable[[Sequence[Layer], int], list[str]]] = {"expected": expected, "worst": worst}


def choose_active(layers: Sequence[Layer], count: int, kind: str) -> list[str]:
    """The names of the layers assumed active.

    Args:
        layers: the layers to choose from, in model order.
        count: how many train; all if there are fewer.
        kind: `expected` or `worst`.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ACTIVE_SETS:
        raise ValueError(f"active must be one of {', '.join(ACTIVE_SETS)}, got {kind!r}")
    return ACTIVE_SETS[kind](layers, min(count, len(layers)))
