"""Which evaluation of a run was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Best"]


@dataclass
class Best:
    """The best evaluation so far."""

    metric: str
    lower: bool
    value: float | None = None
    step: int = 0

    def offer(self, metrics: Mapping[str, float], step: int) -> bool:
        """Take note of an evaluation; whether it is the best so far. Not a number is never best."""
        value = metrics[self.metric]
        if math.isnan(value):
            return False
        better = self.value is None or (value < self.value if self.lower else value > self.value)
        if better:
            self.value, self.step = value, step
        return better
