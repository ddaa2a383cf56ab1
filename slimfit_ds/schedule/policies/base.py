"""What a freeze policy is: pure functions on an explicit, JSON-serialisable state.

A policy knows no tensors, devices, process groups or global random state. Ranks that hold the same
state choose the same layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slimfit_ds.schedule.budget import Budget
from slimfit_ds.trainable.layers import Layer

__all__ = ["Policy", "Selection", "State", "best"]

State = Mapping[str, Any]


@dataclass(frozen=True)
class Selection:
    """What is asked of a policy at one step."""

    layers: tuple[Layer, ...]
    """All freezable layers, in model order; every other field names them by their position here."""
    step: int
    """Optimizer steps done so far."""
    choice: int
    """How many sets a run of this interval has chosen before."""
    budget: Budget
    """What the active set may cost, those in `always` included."""
    candidates: tuple[int, ...]
    """Layers to choose from, in model order; neither `always` nor `never` active ones."""
    always: frozenset[int]
    """Layers that train in any case."""
    seed: int


@dataclass(frozen=True)
class Policy:
    """A way to choose the active layers.

    Example:
        state = policy.init(n_layers=40, seed=0)
        active = policy.select(state, selection)
        state = policy.observe(state, {3: 0.012, 7: 0.004})
    """

    init: Callable[[int, int], State]
    """(number of layers, seed) -> the first state."""
    select: Callable[[State, Selection], frozenset[int]]
    """The active layers of the coming step."""
    observe: Callable[[State, Mapping[int, float]], State]
    """The state after a step: layer -> statistic, for the layers that were active."""
    keeps_budget: bool = True
    """Whether the active set keeps to the rate's budget; else whatever trains at all trains at each step."""
    splits_columns: bool = False
    """Whether linear layers are split before the run (`freezing.columns`), which keeps to the rate instead."""


def best(scores: Sequence[float], selection: Selection) -> frozenset[int]:
    """`always` plus the candidates with the largest scores that fit; of equals, the first in model order."""
    ranked = sorted(selection.candidates, key=lambda layer: (-scores[layer], layer))
    return selection.budget.fill(ranked, selection.always)
