"""Uniformly random layers at each choice: the baseline that any policy has to beat."""

from __future__ import annotations

import random

from slimfit_ds.freezing.policies.base import Policy, Selection, State

__all__ = ["RANDOM"]


def select(state: State, selection: Selection) -> frozenset[int]:
    """A fresh draw for each step from (seed, step), so that nothing has to be saved."""
    free = min(max(selection.n_active - len(selection.always), 0), len(selection.candidates))
    generator = random.Random(f"{selection.seed}/{selection.step}")
    return selection.always | frozenset(generator.sample(selection.candidates, free))


RANDOM = Policy(lambda n_layers, seed: {}, select, lambda state, statistics: state)
