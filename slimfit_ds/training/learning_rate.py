"""The learning rate over a run, as a factor of its highest value."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "rate_factor"]

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}
"""The factor at a share of the way from the end of the warm-up to the end of the run."""


def rate_factor(schedule: str, total: int, warmup: int) -> Callable[[int], float]:
    """The factor at optimizer step 0, 1, ...

    It is positive at every step of the run: a step with rate zero would tell the scheduler of layers that they
    do not change.

    Args:
        schedule: a key of `SCHEDULES`.
        total: steps of the run.
        warmup: steps of linear growth at its start.
    """
    shape = SCHEDULES[schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return shape(min(1.0, (step - warmup) / max(1, total - warmup)))

    return factor
