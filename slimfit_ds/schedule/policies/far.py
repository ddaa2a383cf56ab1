"""Let every layer train a little, then keep those that moved most for the rest of the run.

Source: Vucetic et al., "Efficient Fine-Tuning of BERT Models on the Edge" (FAR, freeze and reconfigure),
arXiv 2205.01541: a priming phase sorts learners from non-learners once. FAR sorts the neurons of feed-forward layers
and trains all of them in the priming phase; here whole layers are sorted, and they are primed in turn, within the
budget.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from slimfit_ds.schedule.policies.base import Policy, Selection, State

__all__ = ["FAR", "PRIMING", "init", "observe", "primed", "priming"]

PRIMING = 3
"""Updates of each layer before the choice."""


def init(n_layers: int, seed: int) -> State:
    """No updates yet; the order of priming is random."""
    order = list(range(n_layers))
    random.Random(seed).shuffle(order)
    return {"order": order, "visits": [0] * n_layers, "moved": [0.0] * n_layers}


def primed(state: State, selection: Selection) -> bool:
    """Whether every layer that fits has been primed."""
    visits = state["visits"]
    return all(
        visits[layer] >= PRIMING or not selection.budget.fits(selection.always | {layer})
        for layer in selection.candidates
    )


def priming(state: State, selection: Selection) -> frozenset[int]:
    """The layers with the fewest updates, in random order."""
    visits, order = state["visits"], state["order"]
    ranked = sorted(selection.candidates, key=lambda layer: (visits[layer], order[layer]))
    return selection.budget.fill(ranked, selection.always)


def select(state: State, selection: Selection) -> frozenset[int]:
    """Those that moved most per update, once all are primed."""
    if not primed(state, selection):
        return priming(state, selection)
    mean = [moved / max(visits, 1) for moved, visits in zip(state["moved"], state["visits"], strict=True)]
    ranked = sorted(selection.candidates, key=lambda layer: (-mean[layer], layer))
    return selection.budget.fill(ranked, selection.always)


def observe(state: State, statistics: Mapping[int, float]) -> State:
    """Count updates and add up statistics while a layer is being primed; the choice is made once."""
    visits, moved = list(state["visits"]), list(state["moved"])
    for layer, value in statistics.items():
        if visits[layer] < PRIMING:
            visits[layer] += 1
            moved[layer] += value
    return {"order": state["order"], "visits": visits, "moved": moved}


FAR = Policy(init, select, observe)
