"""The line on the terminal that says how far a run is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """A bar on the main rank, nothing on the others.

    Args:
        first_step, steps: where the run starts and ends.
        layers: number of layers that can freeze; 0: none.
        metric: name of the metric that is shown.
        shows: whether this rank shows anything.
    """

    def __init__(self, first_step: int, steps: int, *, layers: int, metric: str, shows: bool):
        self._layers, self._metric = layers, metric
        self._bar = tqdm(
            total=steps,
            initial=first_step,
            disable=not shows,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )

    def show(self, line: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """One more step.

        Args:
            line: of the step, as in the history.
            metrics: the latest evaluation; empty before the first one.
        """
        parts = [f"loss {line['loss']:.4f}", f"memory {line['memory_bytes'] / 2**30:.2f} GiB"]
        if line["active_layers"] is not None:
            share = 1 - len(line["active_layers"]) / self._layers
            # Where every layer trains, it is in part (policy static) or there is nothing to say.
            parts.insert(1, f"frozen {share or line.get('frozen_parameters', 0.0):.0%}")
        if metrics:
            parts.append(f"{self._metric} {metrics[self._metric]:.4f}")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
