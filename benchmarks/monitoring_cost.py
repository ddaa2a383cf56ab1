"""What monitoring costs in a real run: the time inside its calls, as a share of the time of a step.

    python benchmarks/monitoring_cost.py --config recipes/digits_vit.yaml max_steps=300
    python benchmarks/monitoring_cost.py --config recipes/minilm_sst2.yaml data_dir=../shared/data/sst2 max_steps=40

Two runs of a few per cent of noise each cannot show one per cent; a stopwatch around the calls themselves can. Calls
of the training loop are timed: phases, fields of the history, logging, pictures, start and end.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from slimfit_ds.training.distributed import read_ranks
from slimfit_ds.training.recipe import read_recipe
from slimfit_ds.training.run import train
from slimfit_ds.training.run_monitor import RunMonitor

SPENT: dict[str, list[float]] = defaultdict(list)


def timed(name: str) -> None:
    """Put a stopwatch around a method of the monitor."""
    inner = getattr(RunMonitor, name)

    def outer(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(*arguments, **named)
        finally:
            SPENT[name].append(time.perf_counter() - start)

    setattr(RunMonitor, name, outer)


def time_phases() -> None:
    """The same for the context around each part of a step: entering and leaving."""
    make = RunMonitor.__init__

    def init(self: RunMonitor, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        inner = self.phase

        @contextmanager
        def phase(name: str):
            start = time.perf_counter()
            context = inner(name)
            context.__enter__()
            entered = time.perf_counter()
            try:
                yield
            finally:
                left = time.perf_counter()
                context.__exit__(None, None, None)
                SPENT["phase"].append(entered - start + time.perf_counter() - left)

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
    for name in ("of_step", "log", "start", "close"):
        timed(name)
    time_phases()
    with tempfile.TemporaryDirectory() as folder:
        fixed = ["report_to=[tensorboard, csv]", "save_model=false", f"output_dir={folder}/run"]
        train(read_recipe(arguments.config, [*fixed, *arguments.overrides]), read_ranks())
        lines = [json.loads(text) for text in (Path(folder) / "run" / "history.jsonl").open()]
    steps = len(lines)
    typical = median(line["seconds"] for line in lines[2:])
    each = {name: sum(SPENT[name]) / steps for name in ("phase", "of_step", "log")}
    always = each["phase"] + each["of_step"]
    whole = always + each["log"]
    print(
        f"{steps} steps, median {typical * 1e3:.2f} ms, mean {fmean(x['seconds'] for x in lines) * 1e3:.2f} ms"
    )
    for name, seconds in each.items():
        print(f"  {name:8} {seconds * 1e6:8.1f} us per step, {seconds / typical:.3%} of a step")
    print(f"  time split and fields of the history, always on: {always / typical:.3%} of a step")
    print(f"  with TensorBoard and CSV every 10 steps:         {whole / typical:.3%} of a step")
    print(f"  once: start {sum(SPENT['start']) * 1e3:.0f} ms, end {sum(SPENT['close']) * 1e3:.0f} ms")


if __name__ == "__main__":
    main()
