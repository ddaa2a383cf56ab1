"""Run the study, or as much of it as there is time for: one JSON per run, resumable, any number of workers.

    python benchmarks/fidelity/study.py --stage tune --problems cifar --seeds 0       # the learning rates
    python benchmarks/fidelity/study.py --stage compare --problems cifar --seeds 0 1 2
    python benchmarks/fidelity/summary.py                                             # tables and pictures

Stages: `tune` runs every contender of the table at each learning rate of the grid; `compare` runs each at its own
best rate on more seeds; `levers` runs the paper's schedule with one thing changed at a time. A run is claimed by a lock
file, so several workers may share a folder; a claim without a result older than `--stale` minutes is taken over.
Single-threaded; run it under `nice`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, LEVERS
from problems import PROBLEMS
from training import Run, train

GRID = (2.5e-4, 6e-4, 1.5e-3)
RESULTS = Path(__file__).with_name("results")


def key(run: Run) -> str:
    """The name of a run's file."""
    name = run.contender.replace(" ", "_").replace("=", "_")
    return f"{run.problem}.{name}.lr{run.lr:g}.seed{run.seed}.steps{run.steps}"


def results(folder: Path) -> list[dict[str, Any]]:
    """Every finished run."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def best_rates(found: Sequence[Mapping[str, Any]], steps: int, seed: int = 0) -> dict[tuple[str, str], float]:
    """(problem, contender) -> the learning rate with the best metric on the tuning seed."""
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for result in found:
        run = result["run"]
        if run["seed"] == seed and run["steps"] == steps:
            place = (run["problem"], run["contender"])
            best[place] = max(best.get(place, (-1.0, 0.0)), (result["value"], run["lr"]))
    return {place: lr for place, (_, lr) in best.items()}


def tuning(
    problem: str, names: Sequence[str], steps: int, seeds: Sequence[int], rates: Sequence[float]
) -> Iterator[Run]:
    """Every contender at every rate; a rate at a time, so that an unfinished study is a fair one."""
    for seed in seeds:
        for lr in rates:
            for name in names:
                yield Run(problem, name, lr, seed, steps=steps, **fields(name))


def comparison(
    problem: str, names: Sequence[str], steps: int, seeds: Sequence[int], folder: Path
) -> Iterator[Run]:
    """Every contender at its own best rate; a seed at a time."""
    rates = best_rates(results(folder), steps)
    for seed in seeds:
        for name in names:
            if (problem, name) in rates:
                yield Run(problem, name, rates[problem, name], seed, steps=steps, **fields(name))


def fields(name: str) -> dict[str, Any]:
    return {**CONTENDERS, **LEVERS}[name]


def work(runs: Iterator[Run], folder: Path, stale: float) -> None:
    """Do every run that nobody has done or is doing."""
    folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        done, claim = folder / f"{key(run)}.json", folder / f"{key(run)}.claim"
        if done.exists():
            continue
        if claim.exists() and time.time() - claim.stat().st_mtime > 60 * stale:
            claim.unlink()
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        outcome = train(run)
        done.write_text(json.dumps(outcome) + "\n")
        claim.unlink()
        print(
            f"{key(run):64s} {100 * outcome['value']:6.2f}  loss {outcome['metrics']['loss']:.4f}"
            f"  {outcome['seconds']:.0f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=("tune", "compare"), required=True)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--names", nargs="+", default=list(CONTENDERS), help="contenders or levers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rates", nargs="+", type=float, default=list(GRID))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--stale", type=float, default=60, help="minutes after which a claim is taken over")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for problem in options.problems:
        if options.stage == "tune":
            runs = tuning(problem, options.names, options.steps, options.seeds, options.rates)
        else:
            runs = comparison(problem, options.names, options.steps, options.seeds, options.results)
        work(runs, options.results, options.stale)


if __name__ == "__main__":
    main()
