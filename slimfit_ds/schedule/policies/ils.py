"""Inter-layer scheduling: train the layers whose last update was relatively largest.

Source: Ardakani et al., "SlimFit", arXiv 2305.18513, section 3 and the behaviour of its reference code.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from slimfit_ds.schedule.policies.base import Policy, Selection, State, best

__all__ = ["ILS"]

# Distances that no statistic reaches: a layer that never trained goes before all that did, so each
# layer trains within the first ceil(L / n_active) choices, in random order.
_UNSEEN = 1e10


def init(n_layers: int, seed: int) -> State:
    """Random huge distances: each layer is updated at least once, in random order."""
    generator = random.Random(seed)
    return {"distance": [_UNSEEN * (1 + generator.random()) for _ in range(n_layers)]}


def select(state: State, selection: Selection) -> frozenset[int]:
    """The layers with the largest distance; of equals, the first in model order."""
    return best(state["distance"], selection)


def observe(state: State, statistics: Mapping[int, float]) -> State:
    """The distance of each layer that trained becomes its statistic; a frozen layer keeps its last."""
    distance = list(state["distance"])
    for layer, value in statistics.items():
        distance[layer] = value
    return {"distance": distance}


ILS = Policy(init, select, observe)
