"""Logs a run to TensorBoard, W&B and CSV files through DeepSpeed's monitors."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from slimfit_ds.monitoring.frozen_share import FrozenShare
from slimfit_ds.monitoring.pictures import schedule_image

__all__ = ["PICTURES", "Monitor", "events_of_lines"]

PICTURES = 5
"""Pictures of the schedule in the course of a run; each reads the whole history."""

Event = tuple[str, float, int]
Line = Mapping[str, Any]


class Monitor:
    """Logs every few steps, on the rank that writes; nothing it meets ends a run.

    Args:
        sink: makes DeepSpeed's `MonitorMaster`; None: log nowhere.
        share: of the engine.
        steps: of the whole run.
        every: steps between two logs.
        history: gives the lines of the history so far, for the picture of the schedule.
    """

    def __init__(
        self,
        sink: Callable[[], Any] | None,
        share: FrozenShare,
        *,
        steps: int,
        every: int,
        history: Callable[[], Sequence[Line]],
    ):
        self._share, self._steps, self._every, self._history = share, steps, every, history
        self._waiting: list[Line] = []
        self._last_picture = 0
        self._master: Any = None
        if sink is not None:
            self._guard(lambda: setattr(self, "_master", sink()))

    def log(self, line: Line) -> None:
        """Take in one step; write when enough have come together.

        Args:
            line: of the history.
        """
        if self._master is None:
            return
        done = line["step"] + 1
        self._waiting.append(line)
        events: list[Event] = []
        if done % self._every == 0 or done == self._steps:
            events += events_of_lines(self._waiting, self._share)
            self._waiting = []
        events += [(f"eval/{name}", value, done) for name, value in (line.get("evaluation") or {}).items()]
        events = [event for event in events if event[1] is not None and math.isfinite(event[1])]
        if events:
            self._guard(lambda: self._master.write_events(events))
        if line["active_layers"] is not None and done - self._last_picture >= self._steps / PICTURES:
            self._last_picture = done
            self._guard(lambda: self._draw(done))

    def describe(self, text: str) -> None:
        """Log a text about the run, its recipe for instance, where a backend takes texts."""
        writer = self._tensorboard()
        if writer is not None:
            self._guard(lambda: writer.add_text("recipe", f"```yaml\n{text}\n```", 0))

    def close(self) -> None:
        """Write what is left and leave the backends."""
        if self._master is None:
            return
        if self._waiting:
            events = events_of_lines(self._waiting, self._share)
            self._waiting = []
            self._guard(lambda: self._master.write_events(events))
        if (writer := self._tensorboard()) is not None:
            self._guard(writer.close)
        if self._master is not None and self._master.wandb_monitor is not None:
            import wandb

            self._guard(wandb.finish)
        self._master = None

    def _draw(self, done: int) -> None:
        lines = self._history()
        picture = schedule_image(lines, list(self._share.sizes))
        last = (lines[-1].get("statistics") or {}).values()
        sizes = np.array([value for value in last if value is not None and value > 0])
        if (writer := self._tensorboard()) is not None:
            writer.add_image("freeze/schedule", picture, done, dataformats="HWC")
            if sizes.size:
                writer.add_histogram("freeze/log10_statistic", np.log10(sizes), done)
            writer.flush()
        if self._master.wandb_monitor is not None:
            import wandb

            wandb.log({"freeze/schedule": wandb.Image(picture)}, step=done)

    def _tensorboard(self) -> Any:
        monitor = getattr(self._master, "tb_monitor", None)
        return None if monitor is None else monitor.summary_writer

    def _guard(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # a full disk, a lost network, an error inside a backend
            self._master = None
            print(f"monitoring is off from here on: {type(error).__name__}: {error}", file=sys.stderr)


def events_of_lines(lines: Sequence[Line], share: FrozenShare) -> list[Event]:
    """What is logged of some steps in a row: means of what varies, the last value of what is set.

    Args:
        lines: of the history; not empty.
        share: of the engine.

    Returns:
        (name, value, number of steps done).
    """
    last = lines[-1]
    done = last["step"] + 1
    values: dict[str, float | None] = {
        "train/loss": _mean(line["loss"] for line in lines),
        "train/learning_rate": last["lr"],
        "train/gradient_norm": _mean(line["gradient_norm"] for line in lines),
        "train/epoch": last["epoch"],
        "time/seconds_per_step": _mean(line["seconds"] for line in lines),
        "memory/peak_bytes": last["memory_bytes"],
    }
    for phase in last.get("times") or {}:
        values[f"time/{phase}_seconds"] = _mean(line["times"].get(phase) for line in lines)
    tokens, seconds = sum(line.get("tokens") or 0 for line in lines), sum(line["seconds"] for line in lines)
    if tokens and seconds:
        values["train/tokens_per_second"] = tokens / seconds
    measured: Mapping[str, float] = next(
        (line["memory"] for line in reversed(lines) if line.get("memory")), {}
    )
    values |= {f"memory/{kind}_bytes": size for kind, size in measured.items()}
    if last["active_layers"] is not None:
        values["freeze/frozen_layers"] = fmean(share.of_layers(line["active_layers"]) for line in lines)
        values["freeze/frozen_parameters"] = fmean(
            share.of_parameters(line["active_layers"]) for line in lines
        )
        found = [v for line in lines for v in (line["statistics"] or {}).values() if v is not None]
        if found:
            values |= {
                "freeze/statistic_smallest": min(found),
                "freeze/statistic_median": median(found),
                "freeze/statistic_largest": max(found),
            }
    return [(name, float(value), done) for name, value in values.items() if value is not None]


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return fmean(known) if known else None
