"""What one training run tells of itself: extra fields of the history, `run.json`, and the monitors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from slimfit_ds.monitoring.backends import settle_wandb
from slimfit_ds.monitoring.frozen_share import FrozenShare
from slimfit_ds.monitoring.monitor import Monitor
from slimfit_ds.monitoring.run_card import RunCard
from slimfit_ds.monitoring.stopwatch import Stopwatch
from slimfit_ds.training.history import read_history
from slimfit_ds.training.output import resolved_yaml
from slimfit_ds.training.surroundings import hardware, versions

if TYPE_CHECKING:
    from slimfit_ds.training.run import Run

__all__ = ["RunMonitor"]


class RunMonitor:
    """Measures on every rank, writes on the main one.

    Used as a context, it writes into `run.json` how the run ended.

    Args:
        run: with its engine, at its first step.
        blocks: monitor blocks of a DeepSpeed configuration; empty: nothing is logged but the history.
    """

    def __init__(self, run: Run, blocks: Mapping[str, Mapping[str, Any]]):
        self._run, self._blocks = run, blocks
        self._share = FrozenShare(run.engine)
        self._stopwatch = Stopwatch.on(run.device)
        self.phase = self._stopwatch.phase
        run.engine.phase_timer = self.phase
        self._card: RunCard | None = None
        self._monitor: Monitor | None = None

    def start(self) -> None:
        """Open the files; the run's folder is there."""
        run = self._run
        self._card = RunCard(run.folder / "run.json", self._facts(), writes=run.ranks.is_main)
        if run.ranks.is_main and self._blocks:
            if "wandb" in self._blocks:
                settle_wandb(run.folder)
            self._monitor = Monitor(
                self._make_sink,
                self._share,
                steps=run.steps,
                every=run.recipe.logging_steps,
                history=lambda: read_history(run.folder / "history.jsonl"),
            )
            self._monitor.describe(resolved_yaml(run.recipe))

    def of_step(self, step: int, active: Sequence[str] | None) -> dict[str, Any]:
        """Fields of the history: seconds by phase, share of frozen parameters, every few steps memory by kind.

        Args:
            step: number of the step that was done.
            active: layers that trained in it; None: no freezing.
        """
        fields: dict[str, Any] = {
            "times": self._stopwatch.read(),
            "frozen_parameters": self._share.of_parameters(active),
        }
        run = self._run
        done = step + 1
        report = getattr(run.engine, "memory_report", None)
        if report is not None and (done % run.recipe.logging_steps == 0 or done == run.steps):
            fields["memory"] = dict(report())
        return fields

    def watch(self, step: int, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a step; if it is the one that the recipe names, with its memory tracked by kind.

        Args:
            step: number of the step, from 0.
            work: does it and returns its line of the history.
        """
        if step + 1 != self._run.recipe.track_memory:
            return work()
        from slimfit_ds.engine.memory_roots import engine_roots
        from slimfit_ds.memory.tracker import MemoryTracker

        engine = self._run.engine
        tracker = MemoryTracker(engine.module, engine_roots(engine), self._run.device)
        plain = engine.step

        def named(*arguments: Any, **options: Any) -> Any:
            with tracker.phase("step"):
                return plain(*arguments, **options)

        engine.step = named
        try:
            with tracker:
                line = work()
        finally:
            engine.step = plain
        report = tracker.report()
        return {**line, "memory_at_peak": {**report.at_peak, "optimizer_host": report.optimizer_host}}

    def log(self, line: Mapping[str, Any]) -> None:
        """Take in a line of the history that is written."""
        if self._monitor is not None:
            self._monitor.log(line)

    def close(self) -> None:
        """The last step is done."""
        if self._monitor is not None:
            self._monitor.close()

    def __enter__(self) -> RunMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._end("finished")
            return
        # Whatever goes wrong here (a full disk, most likely) must not hide why the run ends.
        with suppress(Exception):
            if getattr(error, "exit_code", 1) == 0:
                self._end("stopped")
            else:
                self._end("failed", f"{type(error).__name__}: {error}"[:500])

    def _end(self, status: str, error: str | None = None) -> None:
        self.close()
        if self._card is not None:
            self._card.end(status, error)

    def _make_sink(self) -> Any:
        from slimfit_ds.engine.monitors import make_monitors

        return make_monitors(self._blocks)

    def _facts(self) -> dict[str, Any]:
        run = self._run
        return {
            "steps": run.steps,
            "first_step": run.first_step,
            "layers": self._share.sizes or None,
            "parameters": self._share.total,
            "metric": run.best.metric,
            "world_size": run.ranks.world_size,
            "launcher": run.ranks.launcher,
            "seed": run.recipe.seed,
            "dtype": run.recipe.dtype,
            "logging_steps": run.recipe.logging_steps,
            "versions": versions(),
            "hardware": hardware(run.device),
            "peak_bytes_are": "allocated on the GPU"
            if run.device.type == "cuda"
            else "resident set of a process",
        }
