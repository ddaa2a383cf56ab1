"""Uniformly random layers at each choice: the baseline that any policy has to beat."""

from __future__ import annotations

import random

from slimfit_ds.schedule.policies.base import Policy, Selection, State

__all__ = ["RANDOM"]


def select(state: State, selection: Selection) -> frozenset[int]:
    """A fresh draw for each step from (seed, step), so that nothing has to be saved."""
    generator = random.Random(f"{selection.seed}/{selection.step}")
    order = generator.sample(selection.candidates, len(selection.candidates))
    return selection.budget.fill(order, selection.always)


RANDOM = Policy(lambda n_layers, seed: {}, select, lambda state, statistics: state)
