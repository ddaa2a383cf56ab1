"""`history.jsonl` and `run.json` of a Trainer run, in the form that `slimfit-ds report` reads."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimfit_ds.monitoring.run_card import RunCard
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.training.history import History

__all__ = ["RunLog"]


class RunLog:
    """A line for each step, written once the Trainer has had its chance to report loss and evaluation.

    Args:
        folder: output folder of the run.
        schedule: of the layers.
        first_step: the step that comes next; later lines of an earlier run are dropped.
        facts: for `run.json`.
        writes: whether this rank writes.
    """

    def __init__(
        self, folder: Path, schedule: FreezeSchedule, first_step: int, facts: Mapping[str, Any], writes: bool
    ):
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
        self._schedule = schedule
        self._history = History(folder / "history.jsonl", first_step, writes=writes)
        sizes = {layer.name: layer.numel for layer in schedule.units}
        self._card = RunCard(
            folder / "run.json", {"first_step": first_step, "layers": sizes, **facts}, writes=writes
        )
        self._line: dict[str, Any] | None = None
        self._started = 0.0

    def begin(self, step: int, epoch: float | None, rate: float) -> None:
        """A step begins; the line of the last one is complete."""
        self.flush()
        active = self._schedule.active_names
        self._line = {
            "step": step,
            "epoch": epoch,
            "loss": None,
            "lr": rate,
            "active_layers": [name for name in self._schedule.names if name in active],
        }
        self._started = time.perf_counter()

    def end(self) -> None:
        """The step is done; the schedule has taken in its statistics."""
        if self._line is not None:
            names, values = self._schedule.names, self._schedule.statistics
            statistics = {names[layer]: value for layer, value in values.items()}
            self._line["statistics"] = {name: statistics.get(name) for name in self._line["active_layers"]}
            self._line["seconds"] = time.perf_counter() - self._started

    def add(self, **values: Any) -> None:
        """More about the step that was done."""
        if self._line is not None:
            self._line |= values

    def flush(self) -> None:
        """Write the line of the step that was done."""
        if self._line is not None:
            self._history.add(self._line)
        self._line = None

    def close(self, status: str) -> None:
        """No more steps.

        Args:
            status: `finished`, or `stopped` if the run can go on.
        """
        self.flush()
        self._history.close()
        self._card.end(status)
