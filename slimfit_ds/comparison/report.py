"""A comparison as a table in the terminal, as Markdown, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfit_ds.comparison.result import Outcome
from slimfit_ds.report.memory_plot import plot_stacked_bars
from slimfit_ds.report.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["comparison_table", "write_comparison"]

Column = tuple[str, Callable[[Outcome], str]]


def _columns(outcomes: Sequence[Outcome]) -> list[Column]:
    technical = {"loss", "runtime", "samples_per_second", "steps_per_second"}
    metric = next((name for o in outcomes for name in o.metrics if name not in technical), None)
    columns: list[Column] = [("strategy", lambda o: o.label)]
    if metric is not None:
        columns.append((metric, lambda o: f"{o.metrics.get(metric, float('nan')):.4f}"))
    columns += [
        ("train loss", lambda o: "" if o.loss is None else f"{o.loss:.4f}"),
        ("peak per rank", lambda o: human_bytes(o.peak)),
        ("saved activations", lambda o: human_bytes(o.saved)),
        ("of it dynamic", lambda o: human_bytes(o.saved_dynamic)),
        ("model states", lambda o: human_bytes(o.states)),
        ("per parameter", lambda o: f"{o.states_per_parameter:.2f} B"),
    ]
    if any(o.states_host for o in outcomes):
        columns.append(("states on host", lambda o: human_bytes(o.states_host) if o.states_host else ""))
    columns += [
        ("sent per step", lambda o: "" if o.bytes_per_step is None else human_bytes(o.bytes_per_step)),
        ("time per step", lambda o: "" if o.seconds_per_step is None else human_seconds(o.seconds_per_step)),
    ]
    labels = next((list(o.gpus) for o in outcomes if o.gpus), [])
    return columns + [(f"GPUs of {label}", partial(_gpus, label)) for label in labels]


def _gpus(label: str, outcome: Outcome) -> str:
    return str(outcome.gpus.get(label) or "more than 1024")


def _cells(outcome: Outcome, columns: Sequence[Column]) -> list[str]:
    if outcome.ok:
        return [value(outcome) for _, value in columns]
    return [outcome.label, outcome.status, *[""] * (len(columns) - 2)]


def _notes(outcomes: Sequence[Outcome]) -> list[str]:
    """Return what was run, and what the last strategy needs of what the first does."""
    sound = [o for o in outcomes if o.ok]
    if not sound:
        return []
    first, last = sound[0], sound[-1]
    facts = first.surroundings
    device = facts["hardware"].get("device") or facts["hardware"].get("cpu") or ""
    parts = [f"{facts['world_size']} ranks", f"seed {facts['seed']}", f"{first.steps} steps", device]
    lines = [", ".join(part for part in parts if part)]
    pairs = {
        "saved activations": (first.saved, last.saved),
        "model states": (first.states, last.states),
        "peak": (first.peak, last.peak),
        "bytes sent": (first.bytes_per_step, last.bytes_per_step),
        "time per step": (first.seconds_per_step, last.seconds_per_step),
    }
    ratios = [f"{name} {b / a:.2f}x" for name, (a, b) in pairs.items() if a and b]
    if last is not first:
        lines.append(f"{last.label} against {first.label}: " + ", ".join(ratios))
    return lines


def comparison_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """Return a rich table; failed strategies are rows that say so."""
    from rich.table import Table

    columns = _columns(outcomes)
    table = Table(title=title, caption="\n".join(_notes(outcomes)), title_justify="left")
    for number, (name, _) in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for outcome in outcomes:
        table.add_row(*_cells(outcome, columns), style=None if outcome.ok else "red")
    return table


def _markdown(outcomes: Sequence[Outcome], title: str, facts: dict[str, Any]) -> str:
    columns = _columns(outcomes)
    rows = [[name for name, _ in columns], ["---", *["---:"] * (len(columns) - 1)]]
    rows += [_cells(outcome, columns) for outcome in outcomes]
    lines = [f"# {title}", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    lines += [line + "\n" for line in _notes(outcomes)]
    lines += [f"- {o.label}: {o.status}: {o.error}" for o in outcomes if not o.ok]
    lines += [f"- {key}: {value}" for key, value in facts.items() if value]
    return "\n".join([*lines, "", "![Peak memory of one rank by kind](comparison.png)", ""])


def write_comparison(
    outcomes: Sequence[Outcome], folder: Path, title: str, facts: dict[str, Any]
) -> dict[str, Path]:
    """Write `comparison.json`, `comparison.md` and `comparison.png`.

    Args:
        outcomes: the rows.
        folder: where to; made if needed.
        title: heading of table and picture.
        facts: what was compared.

    Returns:
        Kind of file -> its path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"comparison.{kind}" for kind in ("json", "md", "png")}
    content = {"title": title, **facts, "strategies": [outcome.to_dict() for outcome in outcomes]}
    paths["json"].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    paths["md"].write_text(_markdown(outcomes, title, facts), encoding="utf-8")
    note = next(iter(_notes(outcomes)), "")
    plot_stacked_bars(
        [(o.label, o.at_peak if o.ok else {}) for o in outcomes], paths["png"], title, note=note
    )
    return paths
