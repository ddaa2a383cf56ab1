"""How much of a model does not train in a step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

__all__ = ["FrozenShare"]


class FrozenShare:
    """Counts parameters once, when the engine is made.

    Args:
        engine: with or without a freeze schedule.
    """

    def __init__(self, engine: Any):
        self.sizes: dict[str, int] = {}
        schedule = getattr(engine, "schedule", None)
        if schedule is not None:
            self.sizes = {layer.name: layer.numel for layer in schedule.units}
        self.total = self._always = 0
        for name, parameter in engine.module.named_parameters():
            # Under ZeRO 3 a parameter holds nothing between its uses.
            size = getattr(parameter, "ds_numel", parameter.numel())
            self.total += size
            if name not in self.sizes and parameter.requires_grad:
                self._always += size

    def of_parameters(self, active: Collection[str] | None) -> float:
        """Share of all parameters that do not train.

        Args:
            active: the layers that train; None: there is no schedule.
        """
        training = self._always + sum(self.sizes[name] for name in active or ())
        return 1 - training / max(1, self.total)

    def of_layers(self, active: Collection[str] | None) -> float:
        """Share of the freezable layers that do not train."""
        return 0.0 if active is None else 1 - len(active) / max(1, len(self.sizes))
