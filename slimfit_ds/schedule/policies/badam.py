"""One group of neighbouring layers after the other, in an order that is shuffled anew for each cycle.

Source: Luo et al., "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models",
arXiv 2404.02827, with random reshuffling. There a group is a transformer block; here it is as many neighbours as the
budget holds, so a block that costs more than the budget is trained in parts. `interval` is the paper's K; the paper
starts each group with fresh moments (`optimizer_states.stale_moments: reset`).
"""

from __future__ import annotations

import random

from slimfit_ds.schedule.policies.base import Policy, Selection, State

__all__ = ["BADAM", "groups"]


def groups(selection: Selection) -> list[frozenset[int]]:
    """The candidates in model order, cut wherever the next one does not fit; one that never fits is left out."""
    found: list[frozenset[int]] = []
    current: frozenset[int] = frozenset()
    for layer in selection.candidates:
        if not selection.budget.fits(selection.always | {layer}):
            continue
        if not selection.budget.fits(selection.always | current | {layer}):
            found.append(current)
            current = frozenset()
        current |= {layer}
    return [*found, current] if current else found


def select(state: State, selection: Selection) -> frozenset[int]:
    """The group whose turn it is: each trains once in every cycle of as many choices as there are groups."""
    parts = groups(selection)
    if not parts:
        return selection.always
    cycle, turn = divmod(selection.choice, len(parts))
    random.Random(f"{selection.seed}/{cycle}").shuffle(parts)
    return selection.always | parts[turn]


BADAM = Policy(lambda n_layers, seed: {}, select, lambda state, statistics: state)
