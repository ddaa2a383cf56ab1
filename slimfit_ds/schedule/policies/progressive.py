"""Freeze from the input upwards as layers settle; what trains is next to the output.

Source: Liu et al., "AutoFreeze: Automatically Freezing Model Blocks to Accelerate Fine-tuning", arXiv 2102.01386,
section 3: a layer whose statistic has changed less, relative to its last value, than the median of the layers that
still train is settled, and the front of frozen layers moves up to the first that is not. AutoFreeze measures gradient
norms (`statistic: gradient_norm`) and starts with everything active (`rate: {start: 0, ...}`). Here the budget holds
at every step besides: of the layers above the front those nearest to the output train, and with a constant rate the
layers below never do.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from slimfit_ds.schedule.policies.base import Policy, Selection, State

__all__ = ["PROGRESSIVE"]


def init(n_layers: int, seed: int) -> State:
    """Nothing measured, nothing frozen for good."""
    return {"latest": [None] * n_layers, "change": [None] * n_layers, "front": 0}


def select(state: State, selection: Selection) -> frozenset[int]:
    """From the output down to the front, what fits."""
    above = [layer for layer in selection.candidates if layer >= state["front"]]
    return selection.budget.fill(reversed(above), selection.always)


def observe(state: State, statistics: Mapping[int, float]) -> State:
    """Note how much each statistic changed; move the front over settled layers, never over the last one."""
    latest, change = list(state["latest"]), list(state["change"])
    for layer, value in statistics.items():
        if latest[layer]:
            change[layer] = abs(value - latest[layer]) / latest[layer]
        latest[layer] = value
    front = state["front"]
    known = [value for value in change[front:] if value is not None]
    limit = median(known) if known else 0.0
    # Only layers that still train can settle: a stale change says nothing.
    while front < len(latest) - 1 and front in statistics and _below(change[front], limit):
        front += 1
    return {"latest": latest, "change": change, "front": front}


def _below(change: float | None, limit: float) -> bool:
    return change is not None and change < limit


PROGRESSIVE = Policy(init, select, observe)
