"""Where the seconds of a step go, without making a GPU wait for the measurement."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

__all__ = ["Clock", "CudaClock", "HostClock", "Stopwatch"]


class Clock(Protocol):
    """Gives marks in time, and the seconds between two of them."""

    def mark(self) -> Any: ...

    def seconds(self, start: Any, end: Any) -> float: ...


class HostClock:
    """The host's clock; right for devices that finish an operation before the call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """Events in the current stream: the GPU writes the times down when it gets there."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        # Read after the loss of the step, which comes later in the same stream: nothing is left to wait for.
        end.synchronize()
        return start.elapsed_time(end) / 1000


class Stopwatch:
    """Sums the time of named phases; the time of an inner phase counts for it alone.

    Args:
        clock: None: the host's.

    Example:
        with watch.phase("step"):
            update()
            with watch.phase("schedule"):
                choose_layers()
        watch.read()  # {"step": ..., "schedule": ...}
    """

    def __init__(self, clock: Clock | None = None):
        self._clock = clock or HostClock()
        self._current: str | None = None
        self._since: Any = None
        self._laps: list[tuple[str, Any, Any]] = []

    @classmethod
    def on(cls, device: torch.device) -> Stopwatch:
        """A stopwatch for work on this device."""
        return cls(CudaClock() if device.type == "cuda" else HostClock())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`."""
        outer = self._current
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str | None) -> None:
        now = self._clock.mark()
        if self._current is not None:
            self._laps.append((self._current, self._since, now))
        self._current, self._since = name, now

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading, in the order in which they began."""
        totals: dict[str, float] = {}
        for name, start, end in self._laps:
            totals[name] = totals.get(name, 0.0) + self._clock.seconds(start, end)
        self._laps.clear()
        return totals
