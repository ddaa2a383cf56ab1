"""The layers with the largest statistic for how often they have trained: a top-k that revisits.

Source: Ramesh et al., "BlockLLM: Memory-Efficient Adaptation of LLMs by Selecting and Optimizing the Right Coordinate
Blocks", arXiv 2406.17296, section 3: the norm of a layer's gradient over its visit frequency. Meant for
`statistic: gradient_norm`; a frozen layer has no gradient, so its last known one stands.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from slimfit_ds.schedule.policies.base import Policy, Selection, State, best

__all__ = ["TOP_GRADIENT"]

_UNSEEN = 1e10


def init(n_layers: int, seed: int) -> State:
    """Unseen layers come first, in random order."""
    generator = random.Random(seed)
    return {"size": [_UNSEEN * (1 + generator.random()) for _ in range(n_layers)], "visits": [0] * n_layers}


def select(state: State, selection: Selection) -> frozenset[int]:
    """The largest statistic divided by the number of updates."""
    scores = [size / max(visits, 1) for size, visits in zip(state["size"], state["visits"], strict=True)]
    return best(scores, selection)


def observe(state: State, statistics: Mapping[int, float]) -> State:
    """Take in the statistics and count the updates."""
    size, visits = list(state["size"]), list(state["visits"])
    for layer, value in statistics.items():
        size[layer] = value
        visits[layer] += 1
    return {"size": size, "visits": visits}


TOP_GRADIENT = Policy(init, select, observe)
