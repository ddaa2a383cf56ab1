"""Full fine-tuning through the same code: every layer trains at every step."""

from __future__ import annotations

from slimfit_ds.schedule.policies.base import Policy, Selection, State

__all__ = ["NONE"]


def select(state: State, selection: Selection) -> frozenset[int]:
    """Every layer that may train."""
    return selection.always | frozenset(selection.candidates)


NONE = Policy(lambda n_layers, seed: {}, select, lambda state, statistics: state, keeps_budget=False)
