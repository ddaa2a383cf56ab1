"""Tables and pictures of the study's results.

    python benchmarks/fidelity/summary.py [--results benchmarks/fidelity/results]

`summary.md`: the paired differences to full fine-tuning on all problems in one table; then for each problem and contender
the learning rate that was best on the tuning seed, and over all seeds at that rate the mean and the standard deviation of
the held-out metric in points, the paired difference to full fine-tuning (same seed: same order of the data, same new head)
with its standard error, and the CPU time of a step as a ratio to full fine-tuning's on the same kind of processor.
`curve_PROBLEM.png`: the metric against the step and against CPU time, in steps of full fine-tuning.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS, LEVERS
from problems import PROBLEMS
from study import RESULTS, best_rates, results

# Of runs that do not say.
FIRST_CPU = "Intel(R) Xeon(R) Processor"


@dataclass(frozen=True)
class Row:
    """One contender on one problem, at its own best learning rate; metrics in points."""

    name: str
    lr: float
    rates_tried: int
    values: dict[int, float]
    losses: dict[int, float]
    time_of_full: float
    """CPU time of a step as a ratio to full fine-tuning's; NaN where no processor ran both."""

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values())))

    @property
    def spread(self) -> float:
        return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else math.nan

    def against(self, other: Row, what: str = "values") -> tuple[float, float, int]:
        """Mean difference on the seeds that both have, its standard error, their number."""
        mine, theirs = getattr(self, what), getattr(other, what)
        pairs = [mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys()]
        if not pairs:
            return math.nan, math.nan, 0
        error = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        return float(np.mean(pairs)), error, len(pairs)


def rows(found: Sequence[Mapping[str, Any]], problem: str, steps: int) -> dict[str, Row]:
    """The rows of one problem."""
    chosen = best_rates(found, steps)
    found = [r for r in found if (r["run"]["problem"], r["run"]["steps"]) == (problem, steps)]
    check_pretrained(found, problem)
    unit = seconds_of_full(found)
    table = {}
    for name in [*CONTENDERS, *LEVERS]:
        lr = chosen.get((problem, name))
        mine = [r for r in found if r["run"]["contender"] == name]
        at_best = [r for r in mine if r["run"]["lr"] == lr]
        if at_best:
            table[name] = Row(
                name,
                at_best[0]["run"]["lr"],
                len({r["run"]["lr"] for r in mine}),
                {r["run"]["seed"]: 100 * r["value"] for r in at_best},
                {r["run"]["seed"]: r["metrics"]["loss"] for r in at_best},
                float(np.mean(ratios)) if (ratios := times_of_full(at_best, unit)) else math.nan,
            )
    return table


def check_pretrained(found: Sequence[Mapping[str, Any]], problem: str) -> None:
    """Refuse to compare runs that started from different weights."""
    starts = {r["pretrained"] for r in found if r.get("pretrained")}
    if len(starts) > 1:
        raise SystemExit(
            f"{problem}: runs start from different pretrained weights: {', '.join(sorted(starts))}"
        )


def seconds_of_full(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Processor -> mean CPU seconds of a step of full fine-tuning."""
    seconds: dict[str, list[float]] = {}
    for r in found:
        if r["run"]["contender"] == "full":
            seconds.setdefault(r.get("cpu", FIRST_CPU), []).append(r["seconds"] / r["run"]["steps"])
    return {cpu: float(np.mean(each)) for cpu, each in seconds.items()}


def times_of_full(found: Sequence[Mapping[str, Any]], unit: Mapping[str, float]) -> list[float]:
    """Time of a step as a ratio to full fine-tuning's, of each run whose processor ran that too."""
    pairs = [(r["seconds"] / r["run"]["steps"], unit.get(r.get("cpu", FIRST_CPU))) for r in found]
    return [seconds / full for seconds, full in pairs if full]


def with_error(value: float, error: float, digits: int = 2) -> str:
    if math.isnan(value):
        return ""
    return f"{value:+.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def markdown(found: Sequence[Mapping[str, Any]], problem: str, steps: int) -> str:
    """The table of one problem."""
    table = rows(found, problem, steps)
    lines = [
        f"### {problem}: {PROBLEMS[problem].metric}, {steps} steps",
        "",
        "| | best lr | lrs tried | seeds | mean | spread | against full | held-out loss against full | CPU time / full |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    full = table.get("full")
    for row in table.values():
        difference, error, _ = row.against(full) if full else (math.nan, math.nan, 0)
        loss, loss_error, _ = row.against(full, "losses") if full else (math.nan, math.nan, 0)
        spread = "" if math.isnan(row.spread) else f"{row.spread:.2f}"
        lines.append(
            f"| {row.name} | {row.lr:g} | {row.rates_tried} | {len(row.values)} | {row.mean:.2f} | {spread} "
            f"| {with_error(difference, error)} | {with_error(loss, loss_error, 3)} | {'' if math.isnan(row.time_of_full) else f'{row.time_of_full:.2f}'} |"
        )
    return "\n".join(lines)


def overview(found: Sequence[Mapping[str, Any]], steps: Mapping[str, int]) -> str:
    """Paired differences to full fine-tuning, in points, of the contenders that were run on every problem."""
    tables = {problem: rows(found, problem, steps[problem]) for problem in steps}
    lines = [
        "| points against full | " + " | ".join(tables) + " | mean |",
        "|---|" + "---:|" * (len(tables) + 1),
    ]
    for name in CONTENDERS:
        if name == "full" or not all(name in table and "full" in table for table in tables.values()):
            continue
        against = [table[name].against(table["full"]) for table in tables.values()]
        few = {pairs for _, _, pairs in against}
        note = "" if min(few) >= 3 else f" (seeds: {', '.join(map(str, sorted(few)))})"
        cells = [with_error(value, error) for value, error, _ in against]
        mean = float(np.mean([value for value, _, _ in against]))
        lines.append(f"| {name}{note} | " + " | ".join(cells) + f" | {mean:+.2f} |")
    return "\n".join(lines)


def draw(found: Sequence[Mapping[str, Any]], problem: str, steps: int, path: Path) -> None:
    """The metric against the step and against CPU seconds, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metric = PROBLEMS[problem].metric
    table = {name: row for name, row in rows(found, problem, steps).items() if name in CONTENDERS}
    found = [r for r in found if (r["run"]["problem"], r["run"]["steps"]) == (problem, steps)]
    colours = plt.get_cmap("tab20").colors
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for number, (name, row) in enumerate(table.items()):
        runs = [r for r in found if (r["run"]["contender"], r["run"]["lr"]) == (name, row.lr)]
        value = np.mean([[100 * point[metric] for point in r["curve"]] for r in runs], axis=0)
        at = np.array([point["step"] for point in runs[0]["curve"]])
        for axis, scale in zip(axes, (1.0, row.time_of_full), strict=True):
            axis.plot(
                scale * at, value, marker=".", color=colours[number % 20], label=f"{name} ({len(runs)})"
            )
    axes[0].set(xlabel="optimizer step", ylabel=f"{metric}, points (last: all held-out, before: a sixth)")
    axes[1].set(xlabel="CPU time, in steps of full fine-tuning")
    axes[1].legend(fontsize="small", title="contender (seeds)", bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.suptitle(problem)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, help="instead of each problem's own number")
    options = parser.parse_args()
    found = results(options.results)
    present = [
        p
        for p in PROBLEMS
        if any(
            r["run"]["problem"] == p and r["run"]["steps"] == (options.steps or PROBLEMS[p].steps)
            for r in found
        )
    ]
    steps = {problem: options.steps or PROBLEMS[problem].steps for problem in present}
    text = overview(found, steps) + "\n\n"
    text += "\n\n".join(markdown(found, problem, steps[problem]) for problem in present) + "\n"
    (options.results / "summary.md").write_text(text)
    for problem in present:
        draw(found, problem, steps[problem], options.results / f"curve_{problem}.png")
    print(text)


if __name__ == "__main__":
    main()
