"""Random whole blocks for a stretch of steps; embeddings, final norm and head always.

Source: Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
arXiv 2403.17919, algorithm 1. There the number of blocks is given; here the budget decides how many are drawn, and the
last one of them may be drawn in part. `interval` is the paper's sampling period K.
"""

from __future__ import annotations

import random

from slimfit_ds.schedule.policies.base import Policy, Selection, State
from slimfit_ds.trainable.blocks import find_blocks

__all__ = ["LISA"]


def select(state: State, selection: Selection) -> frozenset[int]:
    """What stands outside of the blocks, as far as the budget holds it, then blocks drawn by (seed, step)."""
    parts = find_blocks([layer.name for layer in selection.layers])
    order = list(parts.blocks)
    random.Random(f"{selection.seed}/{selection.step}").shuffle(order)
    ranking = [*parts.after, *parts.before, *(layer for block in order for layer in block)]
    free = set(selection.candidates)
    return selection.budget.fill([layer for layer in ranking if layer in free], selection.always)


LISA = Policy(lambda n_layers, seed: {}, select, lambda state, statistics: state)
