"""Inter-layer scheduling by update per cost: among layers that move alike the cheap ones train.

The distance of the paper's ILS, divided by the largest share of the budget that the layer takes up in any of its
currencies. With `budget: activations` this is update per byte kept for the backward pass, with `layers` it is ILS.
"""

from __future__ import annotations

from slimfit_ds.schedule.policies import ils
from slimfit_ds.schedule.policies.base import Policy, Selection, State, best

__all__ = ["ILS_PER_COST"]

# What costs nothing in any currency would have no finite score; this is far below any share that matters.
_LEAST_SHARE = 1e-6


def select(state: State, selection: Selection) -> frozenset[int]:
    """The layers with the largest distance per share of the budget."""
    room = selection.budget.room
    shares = [
        max([_LEAST_SHARE, *(cost / limit for cost, limit in zip(costs, room, strict=True) if limit)])
        for costs in selection.budget.costs
    ]
    return best([d / share for d, share in zip(state["distance"], shares, strict=True)], selection)


ILS_PER_COST = Policy(ils.init, select, ils.observe)
