"""Program of one rank of a comparison: the ordinary training run, with its last steps tracked.

Tracked steps are slow, so they do not count for the time; the warm-up neither.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from slimfit_ds.engine.memory_roots import engine_roots
from slimfit_ds.memory.tracker import MemoryReport, MemoryTracker
from slimfit_ds.memory.traffic import TrafficCounter
from slimfit_ds.training.run import Run

__all__ = ["MEASURES", "MeasuredRun", "main"]

MEASURES = "measures.json"
TIMELINE = "memory_of_one_step.png"


class MeasuredRun(Run):
    """A training run that also counts traffic, and tracks memory in its last steps.

    Args:
        found: the inspected recipe.
        device: of this rank.
        traffic: an installed counter.
        warmup: first steps that do not count for the time.
        tracked: last steps that are tracked.
    """

    def __init__(self, found: Any, device: torch.device, traffic: TrafficCounter, warmup: int, tracked: int):
        super().__init__(found, device)
        self._traffic, self._warmup, self._tracked = traffic, warmup, tracked
        self._bytes: list[int] = []
        self._timed: list[float] = []
        self._tracker: MemoryTracker | None = None
        self._reports: list[MemoryReport] = []
        self._name_step_phase()

    def _name_step_phase(self) -> None:
        step = self.engine.step

        def named(*args: Any, **kwargs: Any) -> Any:
            with self._tracker.phase("step") if self._tracker is not None else nullcontext():
                return step(*args, **kwargs)

        self.engine.step = named

    def _step(self, step: int, loader: Any) -> dict[str, Any]:
        track = step >= self.steps - self._tracked
        last = step == self.steps - 1
        self._traffic.reset()
        self._tracker = tracker = (
            MemoryTracker(self.engine.module, engine_roots(self.engine), self.device, timeline=last)
            if track
            else None
        )
        with tracker or nullcontext():
            line = super()._step(step, loader)
        self._tracker = None
        self._bytes.append(self._traffic.total)
        if tracker is not None:
            self._reports.append(tracker.report())
            if last and self.ranks.is_main:
                from slimfit_ds.report.memory_plot import plot_timeline

                plot_timeline(
                    tracker.timeline or (), self.folder / TIMELINE, "Memory of one rank over one step"
                )
        elif step >= self._warmup:
            self._timed.append(self.seconds[-1])
        return line

    def measures(self) -> dict[str, Any]:
        """This rank's numbers."""
        steady = self._bytes[self._warmup :] or self._bytes
        return {
            "memory": max(self._reports, key=lambda report: report.peak).to_dict(),
            "memory_highest": {
                kind: max(getattr(report, kind) for report in self._reports)
                for kind in (
                    "parameters",
                    "gradients",
                    "optimizer",
                    "optimizer_host",
                    "saved_activations_dynamic",
                    "saved_activations_static",
                )
            },
            "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters()),
            "bytes_per_step": sum(steady) / len(steady),
            "seconds_per_step": median(self._timed) if self._timed else None,
            "timed_steps": len(self._timed),
        }


def main(argv: list[str] | None = None) -> int:
    """Run and write `measures.json` into the run's folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--tracked", type=int, default=3)
    parser.add_argument("--failure", required=True, help="file that takes the reason of a failure")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    try:
        _run(arguments)
    except BaseException as error:
        # The launcher's log ends with its own complaints; the parent wants the reason. The first rank to fail tells.
        failure = Path(arguments.failure)
        if not failure.exists():
            failure.write_text(json.dumps({"type": type(error).__name__, "message": str(error)}))
        traceback.print_exc()
        return 2 if type(error).__name__ == "ConfigError" else 1
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from slimfit_ds.engine.processes import start_processes
    from slimfit_ds.training.checks import inspect
    from slimfit_ds.training.distributed import export, read_ranks, share
    from slimfit_ds.training.noise import silence
    from slimfit_ds.training.recipe import read_recipe

    silence()
    ranks = read_ranks()
    found = inspect(read_recipe(arguments.config, arguments.overrides), ranks)
    traffic = TrafficCounter().install()
    export(ranks)
    run = MeasuredRun(found, start_processes(), traffic, arguments.warmup, arguments.tracked)
    run.go()
    own = run.measures()
    everyone: list[Any] = [None] * ranks.world_size
    torch.distributed.all_gather_object(everyone, own)
    if ranks.is_main:
        widest = max(everyone, key=lambda measures: measures["memory"]["peak"])
        (run.folder / MEASURES).write_text(
            json.dumps({**widest, "peaks": [m["memory"]["peak"] for m in everyone]})
        )
    share(None)  # nobody leaves before the file is written


if __name__ == "__main__":
    sys.exit(main())
