"""The front: the block at which the coming step's backward pass ends. What lies below it rests and has no graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from slimfit_ds.trainable.units import find_blocks

__all__ = ["FRONTS", "by_statistics", "depths", "front_of", "half", "mean_of_blocks"]

_GOLDEN = (math.sqrt(5) - 1) / 2
_MEAN_SHARE = 0.75
"""Mean share of the blocks that a step trains, as of `half` in a model of an even number of blocks."""


def depths(names: Sequence[str]) -> dict[str, int]:
    """Return the depth of each parameter: the number of its block.

    Embeddings go with the first block. Final norm, pooler and head, and whatever else stands behind the first block, lie
    deeper than all blocks: their number.

    Args:
        names: of all parameters that may train, in model order.
    """
    parts = find_blocks(names)
    found = dict.fromkeys(names, len(parts.blocks))
    found |= {names[i]: 0 for i in parts.before}
    found |= {names[i]: depth for depth, block in enumerate(parts.blocks) for i in block}
    return found


def half(moved: Sequence[float | None]) -> list[float]:
    """Every other step goes down the whole way, the others to the middle.

    Args:
        moved: of each block, the mean statistic of its units in the last step that trained it; None: none did yet.

    Returns:
        The share of the steps in which each block trains, growing with depth.
    """
    lower = len(moved) // 2
    return [0.5] * lower + [1.0] * (len(moved) - lower)


def by_statistics(moved: Sequence[float | None]) -> list[float]:
    """A block trains as often as it, or one below it, learns: in proportion to the largest statistic up to it.

    The same mean share as of `half`. Arguments and result as there.
    """
    known = [value for value in moved if value is not None]
    if len(known) < len(moved) or not any(known):
        return [1.0] * len(moved)
    highest = [max(known[: i + 1]) for i in range(len(known))]
    # The factor of which the mean, cut off at 1, is the one wanted.
    low, high = 0.0, 1 / min(value for value in highest if value > 0)
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(min(1.0, middle * value) for value in highest) / len(highest)
        low, high = (low, middle) if mean > _MEAN_SHARE else (middle, high)
    return [min(1.0, high * value) for value in highest]


FRONTS = {"half": half, "statistics": by_statistics}
"""Values of `freeze.front` besides `none`."""


def front_of(rule: str, moved: Sequence[float | None], choice: int) -> int:
    """Return the lowest block that trains; the first choice is 0, the whole way.

    Multiples of the golden ratio are spread evenly over [0, 1), so that a block with share p trains in p of any stretch of
    steps.

    Args:
        rule: of `FRONTS`.
        moved: as `half` takes it.
        choice: how many there have been before.
    """
    level = choice * _GOLDEN % 1
    shares = FRONTS[rule](moved)
    return next((depth for depth, share in enumerate(shares) if share > level), len(shares))


def mean_of_blocks(
    statistics: Mapping[int, float], depth_of: Sequence[int], blocks: int
) -> list[float | None]:
    """Return the mean statistic of each block's units; None of a block without any.

    Args:
        statistics: unit -> its latest.
        depth_of: depth of each unit.
        blocks: how many there are.
    """
    values: list[list[float]] = [[] for _ in range(blocks)]
    for unit, value in statistics.items():
        if depth_of[unit] < blocks:
            values[depth_of[unit]].append(value)
    return [sum(found) / len(found) if found else None for found in values]
