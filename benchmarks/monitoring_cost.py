"""What monitoring costs in a real run: the time inside its calls, as a share of the time of a step.

    python benchmarks/monitoring_cost.py --config recipes/digits_vit.yaml max_steps=300
    python benchmarks/monitoring_cost.py --config recipes/minilm_sst2.yaml data_dir=../shared/data/sst2 max_steps=40

Two runs of a few per cent of noise each cannot show one per cent; a stopwatch around the calls themselves can. Calls
of the training loop are timed (phases, fields of the history, logging with its pictures), by the wall clock and by
the processor time of the thread, which other programs on the machine do not change.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from slimfit_ds.training.distributed import read_ranks
from slimfit_ds.training.recipe import read_recipe
from slimfit_ds.training.run import train
from slimfit_ds.training.run_monitor import RunMonitor

SPENT: dict[str, list[tuple[float, float]]] = defaultdict(list)
"""Call -> (wall seconds, processor seconds) of each."""


@contextmanager
def stopwatch(name: str) -> Iterator[None]:
    """Note the time inside."""
    wall, processor = time.perf_counter(), time.thread_time()
    try:
        yield
    finally:
        SPENT[name].append((time.perf_counter() - wall, time.thread_time() - processor))


def timed(name: str) -> None:
    """Put a stopwatch around a method of the monitor."""
    inner = getattr(RunMonitor, name)

    def outer(*arguments: Any, **named: Any) -> Any:
        with stopwatch(name):
            return inner(*arguments, **named)

    setattr(RunMonitor, name, outer)


def time_phases() -> None:
    """The same for the context around each part of a step: entering and leaving."""
    make = RunMonitor.__init__

    def init(self: RunMonitor, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        inner = self.phase

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            context = inner(name)
            with stopwatch("phase"):
                context.__enter__()
            try:
                yield
            finally:
                with stopwatch("phase"):
                    context.__exit__(None, None, None)

        self.phase = phase
        self._run.engine.phase_timer = phase

    RunMonitor.__init__ = init  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("overrides", nargs="*", default=[])
    arguments = parser.parse_intermixed_args()
    for name in ("watch", "of_step", "log", "start", "close"):
        timed(name)
    time_phases()
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["report_to=[tensorboard, csv]", "save_model=false", f"output_dir={folder}/run"]
        train(read_recipe(arguments.config, [*fixed, *arguments.overrides]), read_ranks())
        lines = [json.loads(text) for text in (Path(folder) / "run" / "history.jsonl").open()]
    steps = len(lines)
    step = [median(entry[clock] for entry in SPENT["watch"][2:]) for clock in (0, 1)]
    print(
        f"{steps} steps, median {step[0] * 1e3:.2f} ms, of it {step[1] * 1e3:.2f} ms of this processor thread"
    )
    shares = {}
    for name in ("phase", "of_step", "log"):
        each = [sum(entry[clock] for entry in SPENT[name]) / steps for clock in (0, 1)]
        shares[name] = [each[clock] / step[clock] for clock in (0, 1)]
        print(
            f"  {name:8} {each[0] * 1e6:8.1f} us per step ({shares[name][0]:.3%}), "
            f"processor {each[1] * 1e6:8.1f} us ({shares[name][1]:.3%})"
        )
    for what, names in (
        ("time split and fields of the history, always on", ("phase", "of_step")),
        ("with TensorBoard and CSV", ("phase", "of_step", "log")),
    ):
        wall, processor = (sum(shares[name][clock] for name in names) for clock in (0, 1))
        print(f"  {what}: {wall:.3%} of a step, by processor time {processor:.3%}")
    once = {name: sum(entry[0] for entry in SPENT[name]) * 1e3 for name in ("start", "close")}
    print(f"  once: start {once['start']:.0f} ms, end {once['close']:.0f} ms")


if __name__ == "__main__":
    main()
