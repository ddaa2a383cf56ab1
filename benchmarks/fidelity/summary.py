"""Tables of the fidelity study, from `benchmarks/results/fidelity.csv`.

    python benchmarks/fidelity/summary.py [--csv PATH] [--steps N]

For each problem and contender: the learning rate that its search chose, and over all seeds at that rate the mean and the
standard deviation of the held-out metric in points, the paired difference to full fine-tuning (same seed: same order of
the data, same new head) with its standard error, and the CPU time of a step as a ratio to full fine-tuning's on the same
kind of processor.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Study, markdown
from problems import PROBLEMS
from study import best_rate

PRESETS = ("balanced", "minimal")
# Rows of the tables; `ils+` is of a lever that is gone.
ORDER: tuple[str, ...] = ("full", "lora4", "lora8", "lora16", "lora8-sixth")
ORDER += tuple(
    f"{name}-{rate}"
    for name in ("ils", "ils+", "ours", "ours-nowords", "random", "lisa", "badam")
    for rate in (90, 95)
) + tuple(f"ours-90-{preset}" for preset in PRESETS)
LABELS = {
    "ours-90": "**ours**, 90 % frozen",
    "lora8": "LoRA rank 8 (keeps all inputs)",
    "ils-90": "the paper's schedule, 90 %",
    "lisa-90": "LISA, 90 %",
    "random-90": "random layers, 90 %",
    "badam-90": "BAdam-like, 90 %",
    "ours-95": "**ours**, 95 % frozen",
    "ils-95": "the paper's schedule, 95 %",
    "lisa-95": "LISA, 95 %",
    "random-95": "random layers, 95 %",
    "badam-95": "BAdam-like, 95 %",
}


@dataclass(frozen=True)
class Row:
    """One contender on one problem, at its own best learning rate; metrics in points, by seed."""

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
        """Return the mean difference on the seeds that both have, its standard error, their number."""
        mine, theirs = getattr(self, what), getattr(other, what)
        pairs = [mine[seed] - theirs[seed] for seed in mine.keys() & theirs.keys()]
        if not pairs:
            return math.nan, math.nan, 0
        error = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        return float(np.mean(pairs)), error, len(pairs)


def rows_of(found: Sequence[Mapping[str, Any]], problem: str, steps: int) -> dict[str, Row]:
    """Return the rows of one problem by contender.

    Raises:
        SystemExit: runs started from different pretrained weights.
    """
    found = [r for r in found if (r["problem"], r["steps"]) == (problem, steps)]
    if len(starts := {r["pretrained"] for r in found if r.get("pretrained")}) > 1:
        raise SystemExit(
            f"{problem}: runs start from different pretrained weights: {', '.join(sorted(starts))}"
        )
    full: dict[str, list[float]] = {}
    for r in found:
        if r["contender"] == "full":
            full.setdefault(r["hardware"], []).append(r["cpu_seconds"])
    table: dict[str, Row] = {}
    for name in ORDER:
        mine = [r for r in found if r["contender"] == name]
        lr = best_rate(mine)
        best = [r for r in mine if r["lr"] == lr]
        ratios = [r["cpu_seconds"] / np.mean(full[r["hardware"]]) for r in best if r["hardware"] in full]
        if best and lr is not None:
            table[name] = Row(
                name,
                lr,
                len({r["lr"] for r in mine}),
                {r["seed"]: 100 * r["value"] for r in best},
                {r["seed"]: r["loss"] for r in best},
                float(np.mean(ratios)) if ratios else math.nan,
            )
    return table


def with_error(value: float, error: float, digits: int = 2) -> str:
    if math.isnan(value):
        return ""
    return f"{value:+.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def problem_table(table: Mapping[str, Row], problem: str, steps: int) -> str:
    """Return the table of one problem."""
    full = table["full"]
    lines = [
        [
            row.name,
            f"{row.lr:g}",
            row.rates_tried,
            len(row.values),
            f"{row.mean:.2f}",
            number(row.spread),
            with_error(*row.against(full)[:2]),
            with_error(*row.against(full, "losses")[:2], 3),
            number(row.time_of_full),
        ]
        for row in table.values()
    ]
    titles = ["", "best lr", "lrs tried", "seeds", "mean", "spread", "against full"]
    titles += ["held-out loss against full", "CPU time / full"]
    return f"### {problem}: {PROBLEMS[problem].metric}, {steps} steps\n\n{markdown(titles, lines)}"


def overview(tables: Mapping[str, Mapping[str, Row]]) -> str:
    """Return paired differences to full fine-tuning, in points, of the contenders that were run on every problem."""
    lines = []
    for name, label in LABELS.items():
        if all(name in table for table in tables.values()):
            against = [table[name].against(table["full"]) for table in tables.values()]
            seeds = "/".join(dict.fromkeys(str(pairs) for _, _, pairs in against))
            mean = np.mean([value for value, _, _ in against])
            cells = [with_error(value, error) for value, error, _ in against]
            lines.append([label, seeds, *cells, f"{mean:+.2f}"])
    names = [f"{name} (Matthews)" if name == "cola" else name for name in tables]
    return markdown(["points against full fine-tuning", "seeds", *names, "mean"], lines)


def in_brief(tables: Mapping[str, Mapping[str, Row]]) -> str:
    """Return the table of the README: full fine-tuning, and points against it of a few, a row per problem."""
    problems = {
        "cifar": "small ViT, four new classes of CIFAR-10, accuracy",
        "sst2": "MiniLM, SST-2, accuracy",
        "mrpc": "MiniLM, MRPC, accuracy",
        "cola": "MiniLM, CoLA, Matthews correlation",
    }
    shown = {
        "ours-90": "**ours**, 90 % frozen",
        "ours-95": "**ours**, 95 %",
        "lora8": "LoRA, rank 8",
        "ils-90": "paper's schedule, 90 %",
        "lisa-90": "LISA, 90 %",
        "random-90": "random, 90 %",
    }
    lines, means = [], []
    for problem, label in problems.items():
        table = tables[problem]
        against = [table[name].against(table["full"])[:2] for name in shown]
        means.append([value for value, _ in against])
        lines.append([label, f"{table['full'].mean:.1f}", *(with_error(*pair, 1) for pair in against)])
    mean = [f"{value:+.1f}" for value in np.mean(means, axis=0)]
    lines.append(["mean", "", *(f"**{text}**" for text in mean[:2]), *mean[2:]])
    return markdown(["", "full", *shown.values()], lines)


def presets(tables: Mapping[str, Mapping[str, Row]]) -> str:
    """Return compressed activations against exact ones with the same seed: points, held-out loss."""
    lines = []
    for problem, table in tables.items():
        cells = []
        for preset in PRESETS:
            row, exact = table[f"ours-90-{preset}"], table["ours-90"]
            value, error, pairs = row.against(exact)
            loss, loss_error, _ = row.against(exact, "losses")
            cells.append(
                f"{with_error(value, error)}, {with_error(loss, loss_error, 3)}"
                + (f" ({pairs})" if pairs < 3 else "")
            )
        lines.append([problem, *cells])
    return markdown(["", *PRESETS], lines)


def adapters(tables: Mapping[str, Mapping[str, Row]]) -> str:
    """Return LoRA at several ranks against ours on seed 0: metric, held-out loss."""
    lines = []
    for name in (*ORDER[1:5], "ours-90"):
        rows = [table[name] for table in tables.values()]
        lines.append([name, *(f"{row.values[0]:.2f}, {row.losses[0]:.3f}" for row in rows)])
    return markdown(["", *tables], lines)


def transfer(found: Sequence[Mapping[str, Any]], full: Mapping[str, float]) -> str:
    """Return `lr_scale: auto` at full fine-tuning's best rate and at the best of the rates that were run, on one seed.

    Args:
        found: rows of the study `transfer`.
        full: problem -> best rate of full fine-tuning.
    """
    lines = []
    for problem, name in dict.fromkeys((row["problem"], row["contender"]) for row in found):
        of = {r["lr"]: r for r in found if (r["problem"], r["contender"]) == (problem, name)}
        lr = full[problem]
        if lr not in of:
            continue
        best = max(of, key=lambda rate: of[rate]["value"])
        points = 100 * (of[lr]["value"] - of[best]["value"])
        loss = of[lr]["loss"] - min(row["loss"] for row in of.values())
        tried = ", ".join(f"{rate:g}" for rate in sorted(of) if rate != lr)
        cells = [f"{100 * of[lr]['value']:.2f}", f"{best:g}", f"{points:+.2f}", f"{loss:+.3f}"]
        lines.append([problem, f"{name.partition('-')[2]} %", f"{lr:g}", tried, *cells])
    titles = [
        "",
        "frozen",
        "full's best rate",
        "also run",
        "points there",
        "best of them",
        "against its points",
    ]
    return markdown([*titles, "held-out loss against the lowest"], lines)


def tables(csv: str = "fidelity", steps: int | None = None) -> dict[str, str]:
    """Return the tables of the documents by their marks."""
    found = Study(csv, ()).rows(study="main")
    lengths = {name: steps or problem.steps for name, problem in PROBLEMS.items()}
    made = {name: rows_of(found, name, lengths[name]) for name in lengths}
    made = {name: table for name, table in made.items() if "full" in table}
    by_problem = "\n\n".join(problem_table(table, name, lengths[name]) for name, table in made.items())
    order: list[str] = [name for name in ("cifar", "sst2", "mrpc", "cola") if name in made]
    ordered = {name: made[name] for name in order}
    shown = {"fidelity-overview": overview(ordered), "fidelity-problems": by_problem}
    if runs := Study(csv, ()).rows(study="transfer"):
        shown |= {
            "fidelity-transfer": transfer(runs, {name: table["full"].lr for name, table in made.items()})
        }
    if steps is None and len(made) == len(PROBLEMS):
        shown |= {"fidelity-presets": presets(ordered), "fidelity-adapters": adapters(ordered)}
        shown |= {"fidelity-brief": in_brief(ordered)}
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--csv", default="fidelity", help="name of a study, or a path that ends in .csv")
    parser.add_argument("--steps", type=int, help="instead of each problem's own number")
    options = parser.parse_args()
    print("\n\n".join(tables(options.csv, options.steps).values()))


if __name__ == "__main__":
    main()
