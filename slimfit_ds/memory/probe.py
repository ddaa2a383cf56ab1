"""The one harness for what an optimizer step costs: memory by kind, bytes sent, seconds."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from slimfit_ds.memory.tracker import (
    HOST,
    HOST_WEIGHTS,
    MemoryReport,
    MemoryTracker,
    Peak,
    Roots,
    training_device,
)
from slimfit_ds.memory.traffic import TrafficCounter

__all__ = ["StepCost", "StepProbe"]

_HELD = (
    "parameters",
    "gradients",
    "optimizer",
    HOST,
    HOST_WEIGHTS,
    "saved_activations_dynamic",
    "saved_activations_static",
)


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step of one rank took.

    Args:
        seconds: wall time, the device's queue included; a tracked step is far slower than an ordinary one.
        bytes_sent: payload of all collectives; None: not counted.
        memory: bytes by kind; None: the step was not tracked.
        timeline: `(phase, module, bytes by kind)` at every change, if asked for.
        peaks: the largest totals by phase and module, of a tracked step.
    """

    seconds: float
    bytes_sent: int | None = None
    memory: MemoryReport | None = None
    timeline: list[tuple[str, str, dict[str, int]]] | None = None
    peaks: tuple[Peak, ...] = ()


class StepProbe:
    """Measure the optimizer steps of any training loop, all their micro-batches included.

    Example:
        probe = StepProbe(model, optimizer, {"optimizer": lambda: optimizer_tensors(optimizer)})
        with probe.step(track=True):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        probe.costs[-1].memory.peak  # bytes
    """

    def __init__(
        self,
        model: nn.Module,
        updater: Any,
        roots: Roots | None = None,
        device: torch.device | str | None = None,
        traffic: TrafficCounter | None = None,
        updates_on_host: bool = False,
    ):
        """
        Args:
            model: the module that is trained.
            updater: what updates the weights by its `step` method: an optimizer, or a DeepSpeed engine. What
                `step` does in a tracked step counts as the phase `step`.
            roots: further kinds of tensors, as `MemoryTracker` takes them.
            device: the training device; default: that of the parameters.
            traffic: a counter that is installed; None: bytes sent are not counted.
            updates_on_host: the update works in host memory, so the phase `step` does not count for the peak.
        """
        self.model, self._updater, self._roots = model, updater, roots
        self._device = torch.device(device or training_device(model))
        self._traffic = traffic
        self._without = ("step",) if updates_on_host else ()
        self._open: ExitStack | None = None
        self.costs: list[StepCost] = []
        """One for each step measured, in order."""

    @contextmanager
    def step(self, track: bool = False, timeline: bool = False) -> Iterator[None]:
        """Measure the optimizer step that is done inside.

        Args:
            track: track memory too.
            timeline: keep every change of a tracked step, for a picture.
        """
        self.begin(track, timeline)
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self.end()

    def begin(self, track: bool = False, timeline: bool = False) -> None:
        """Start to measure a step, for loops that offer call-backs only; arguments as of `step`."""
        self.abandon()
        self._open = ExitStack()
        self._tracker: MemoryTracker | None = None
        if track:
            self._tracker = MemoryTracker(self.model, self._roots, self._device, timeline=timeline)
            self._open.enter_context(self._tracker)
            self._open.enter_context(_named_step(self._updater, self._tracker))
        self._sent = self._traffic.total if self._traffic is not None else 0
        self._start = self._now()

    def end(self) -> None:
        """The step that `begin` started is done.

        Raises:
            RuntimeError: no step was begun.
        """
        if self._open is None:
            raise RuntimeError("StepProbe.end without begin: no step is being measured")
        seconds = self._now() - self._start
        sent = None if self._traffic is None else self._traffic.total - self._sent
        self._open.close()
        self._open = None
        tracker = self._tracker
        self.costs.append(
            StepCost(seconds, sent)
            if tracker is None
            else StepCost(
                seconds,
                sent,
                tracker.report(self._without),
                tracker.timeline,
                tuple(tracker.peaks(self._without)),
            )
        )

    def abandon(self) -> None:
        """Forget a step that was begun and will not end."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def summary(self, warmup: int = 0) -> dict[str, Any]:
        """The steps so far in plain values, ready for JSON.

        Args:
            warmup: first steps that count neither for the time nor for the bytes sent.

        Returns:
            `memory`: the report of the tracked step with the highest peak; `highest`: the most held of each kind
            over tracked steps; `seconds_per_step`: median of untracked steps; `bytes_per_step`: mean; None where
            no step says so.
        """
        reports = [cost.memory for cost in self.costs if cost.memory is not None]
        steady = self.costs[warmup:]
        timed = [cost.seconds for cost in steady if cost.memory is None]
        sent = [cost.bytes_sent for cost in steady or self.costs if cost.bytes_sent is not None]
        return {
            "steps": len(self.costs),
            "timed_steps": len(timed),
            "seconds_per_step": median(timed) if timed else None,
            "bytes_per_step": mean(sent) if sent else None,
            "memory": max(reports, key=lambda report: report.peak).to_dict() if reports else None,
            "highest": {kind: max(getattr(r, kind) for r in reports) for kind in _HELD} if reports else None,
        }

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@contextmanager
def _named_step(updater: Any, tracker: MemoryTracker) -> Iterator[None]:
    """Let `updater.step` run in the phase `step`, and put the method back afterwards."""
    before, plain = vars(updater).get("step"), updater.step

    # With the attributes of the original: learning-rate schedulers look for their mark on it.
    @functools.wraps(plain)
    def step(*arguments: Any, **options: Any) -> Any:
        with tracker.phase("step"):
            return plain(*arguments, **options)

    updater.step = step
    try:
        yield
    finally:
        if before is None:
            del updater.step
        else:
            updater.step = before
