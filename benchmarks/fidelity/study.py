"""Run the study, or as much of it as there is time for: one JSON per run, resumable, any number of workers.

    python benchmarks/fidelity/study.py --stage tune --problems cifar                 # the learning rates
    python benchmarks/fidelity/study.py --stage refine --problems cifar --names full ours-95
    python benchmarks/fidelity/study.py --stage compare --problems cifar --seeds 0 1 2
    python benchmarks/fidelity/summary.py                                             # tables and pictures

Stages: `tune` looks for the best learning rate of every contender on seed 0: the two rates in the middle of the ladder,
then outwards for as long as the outermost rate that was tried is the best one, the same way for everybody. `refine` runs
that rate, the second best and the one halfway between them on seeds 0 to 2, of which the best mean counts from then on: one
seed of a short run tells rates apart that are far from each other, not these. `compare` runs each contender at its own best rate
on more seeds. A run is claimed by a lock file, so several workers may share a
folder; a claim without a result older than `--stale` minutes is taken over. Single-threaded; run it under `nice`.
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

LADDER = (2.5e-5, 5e-5, 1e-4, 2.5e-4, 6e-4, 1.5e-3, 4e-3, 1e-2)
# Halfway from one rate of the ladder to the next.
BETWEEN = (3.5e-5, 7e-5, 1.5e-4, 4e-4, 1e-3, 2.5e-3, 6e-3)
# Where the search begins: what full fine-tuning and a tenth of the layers liked best on the first problems.
START = (2.5e-4, 6e-4)
TUNING_SEED = 0
REFINING_SEEDS = (0, 1, 2)
RESULTS = Path(__file__).with_name("results")


def key(run: Run) -> str:
    """The name of a run's file."""
    name = run.contender.replace(" ", "_").replace("=", "_")
    return f"{run.problem}.{name}.lr{run.lr:g}.seed{run.seed}.steps{run.steps}"


def results(folder: Path) -> list[dict[str, Any]]:
    """Every finished run."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def best_rates(found: Sequence[Mapping[str, Any]], steps: int) -> dict[tuple[str, str], float]:
    """(problem, contender) -> its learning rate.

    The one with the best metric on the tuning seed; where all of `contested` have been run on `REFINING_SEEDS`, the best
    mean of these.
    """
    merits: dict[tuple[str, str], dict[float, dict[int, tuple[float, float, float]]]] = {}
    for result in found:
        run = result["run"]
        if run["steps"] == steps:
            rates = merits.setdefault((run["problem"], run["contender"]), {})
            rates.setdefault(run["lr"], {})[run["seed"]] = merit(result)
    best = {}
    for place, rates in merits.items():
        close = contested({lr: of[TUNING_SEED] for lr, of in rates.items() if TUNING_SEED in of})
        if close and all(seed in rates.get(lr, ()) for lr in close for seed in REFINING_SEEDS):
            best[place] = max(close, key=lambda lr, rates=rates: mean_merit(rates[lr]))
        elif close:
            best[place] = close[0]
    return best


def contested(tried: Mapping[float, tuple[float, ...]]) -> list[float]:
    """The best rate, the second best, and those of `BETWEEN` that lie between them.

    Args:
        tried: rate -> merit on the tuning seed; those of `BETWEEN` are not looked at.
    """
    best = sorted((lr for lr in tried if lr not in BETWEEN), key=tried.__getitem__, reverse=True)[:2]
    return best + [lr for lr in BETWEEN if best and min(best) < lr < max(best)]


def mean_merit(merits: Mapping[int, tuple[float, float, float]]) -> tuple[float, ...]:
    """Over the refining seeds."""
    each = [merits[seed] for seed in REFINING_SEEDS]
    return tuple(sum(part) / len(each) for part in zip(*each, strict=True))


def merit(result: Mapping[str, Any]) -> tuple[float, float, float]:
    """What a learning rate is chosen by: the metric; of equals, the lower held-out loss; of equals, the lower rate."""
    return result["value"], -result["metrics"]["loss"], -result["run"]["lr"]


def next_rate(tried: Mapping[float, tuple[float, ...]], ladder: Sequence[float] = LADDER) -> float | None:
    """The rate to try next, or None when the best one lies between two worse ones or at the end of the ladder.

    Where all have the same metric, none has learned anything: then rates on both sides are tried.

    Args:
        tried: rate -> merit, what is known.
        ladder: rates in ascending order; `START` is part of it.
    """
    for lr in START:
        if lr not in tried:
            return lr
    at = ladder.index(max(tried, key=tried.__getitem__))
    places = [at - 1, at + 1]
    if len({tried[lr][0] for lr in tried}) == 1:
        places += [ladder.index(min(tried)) - 1, ladder.index(max(tried)) + 1]
    neighbours = [ladder[i] for i in places if 0 <= i < len(ladder)]
    return next((lr for lr in neighbours if lr not in tried), None)


def tried_rates(
    problem: str, name: str, steps: int | None, folder: Path
) -> dict[float, tuple[float, float, float]]:
    """Rate of the ladder -> merit on the tuning seed, what is known."""
    wanted = (problem, name, steps, TUNING_SEED)
    return {
        r["run"]["lr"]: merit(r)
        for r in results(folder)
        if tuple(r["run"][key] for key in ("problem", "contender", "steps", "seed")) == wanted
        and r["run"]["lr"] in LADDER
    }


def tuning(problem: str, names: Sequence[str], steps: int | None, folder: Path) -> Iterator[Run]:
    """Every contender at the rates that its search asks for, one rate at a time around the contenders."""
    searching = list(names)
    while searching:
        still = []
        for name in searching:
            lengths = Run(problem, name, 0.0, steps=steps, **fields(name)).sized()
            tried = tried_rates(problem, name, lengths.steps, folder)
            lr = next_rate(tried)
            if lr is None:
                continue
            run = Run(problem, name, lr, TUNING_SEED, steps=steps, **fields(name)).sized()
            if not (folder / f"{key(run)}.claim").exists():
                still.append(name)
                yield run
        searching = still


def refinement(problem: str, names: Sequence[str], steps: int | None, folder: Path) -> Iterator[Run]:
    """Every contender at its contested rates; a seed at a time."""
    length = steps or PROBLEMS[problem].steps
    for seed in REFINING_SEEDS:
        for name in names:
            for lr in contested(tried_rates(problem, name, length, folder)):
                yield Run(problem, name, lr, seed, steps=steps, **fields(name)).sized()


def comparison(
    problem: str, names: Sequence[str], steps: int | None, seeds: Sequence[int], folder: Path
) -> Iterator[Run]:
    """Every contender at its own best rate; a seed at a time."""
    rates = best_rates(results(folder), steps or PROBLEMS[problem].steps)
    for seed in seeds:
        for name in names:
            if (problem, name) in rates:
                yield Run(problem, name, rates[problem, name], seed, steps=steps, **fields(name)).sized()


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
    parser.add_argument("--stage", choices=("tune", "refine", "compare"), required=True)
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--names", nargs="+", default=list(CONTENDERS), help="contenders or levers")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of `compare`")
    parser.add_argument("--steps", type=int, help="instead of each problem's own number")
    parser.add_argument("--stale", type=float, default=60, help="minutes after which a claim is taken over")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for problem in options.problems:
        if options.stage == "tune":
            runs = tuning(problem, options.names, options.steps, options.results)
        elif options.stage == "refine":
            runs = refinement(problem, options.names, options.steps, options.results)
        else:
            runs = comparison(problem, options.names, options.steps, options.seeds, options.results)
        work(runs, options.results, options.stale)


if __name__ == "__main__":
    main()
