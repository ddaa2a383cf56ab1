"""A comparison as a table in the terminal, as JSON, as a picture and as a page."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfit_ds.report.memory_plot import plot_stacked_bars
from slimfit_ds.report.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from slimfit_ds.comparison.result import Outcome

__all__ = ["comparison_table", "write_comparison"]

Column = tuple[str, Callable[["Outcome"], str]]


def _columns(outcomes: Sequence[Outcome]) -> list[Column]:
    metric = next((name for o in outcomes for name in o.metrics if name != "loss"), None)
    columns: list[Column] = [("method", lambda o: o.label)]
    if metric is not None:
        columns.append((metric, lambda o: f"{o.metrics.get(metric, float('nan')):.4f}"))
    columns += [
        ("train loss", lambda o: "" if o.loss is None else f"{o.loss:.4f}"),
        ("peak per rank", lambda o: human_bytes(o.peak)),
        ("saved activations", lambda o: human_bytes(o.saved_dynamic + o.saved_static)),
        ("of it dynamic", lambda o: human_bytes(o.saved_dynamic)),
        ("model states", lambda o: human_bytes(o.states)),
        ("states per parameter", lambda o: f"{o.states_per_parameter:.2f} B"),
    ]
    if any(o.states_host for o in outcomes):
        columns.append(("states on host", lambda o: human_bytes(o.states_host)))
    columns += [
        ("time per step", lambda o: "" if o.seconds_per_step is None else human_seconds(o.seconds_per_step)),
        ("sent per step", lambda o: "" if o.bytes_per_step is None else human_bytes(o.bytes_per_step)),
    ]
    labels = next((list(o.gpus) for o in outcomes if o.gpus), [])
    columns += [(f"GPUs of {label}", partial(_gpus, label)) for label in labels]
    return columns


def _gpus(label: str, outcome: Outcome) -> str:
    return str(outcome.gpus.get(label) or "more than 1024")


def _cells(outcome: Outcome, columns: Sequence[Column]) -> list[str]:
    if outcome.ok:
        return [value(outcome) for _, value in columns]
    return [outcome.label, outcome.status, *[""] * (len(columns) - 2)]


def _saving(outcomes: Sequence[Outcome]) -> list[str]:
    """What the last method keeps of the first, in a line each."""
    sound = [o for o in outcomes if o.ok]
    if len(sound) < 2:
        return []
    first, last = sound[0], sound[-1]
    pairs = [
        (
            "saved activations",
            first.saved_dynamic + first.saved_static,
            last.saved_dynamic + last.saved_static,
        ),
        ("model states", first.states, last.states),
        ("peak", first.peak, last.peak),
        ("bytes sent", first.bytes_per_step or 0, last.bytes_per_step or 0),
        ("time per step", first.seconds_per_step or 0, last.seconds_per_step or 0),
    ]
    parts = [f"{name} {b / a:.2f}x" for name, a, b in pairs if a and b]
    return [f"{last.label} against {first.label}: " + ", ".join(parts)]


def _note(outcomes: Sequence[Outcome]) -> str:
    for outcome in outcomes:
        if outcome.ok:
            s = outcome.surroundings
            device = s["hardware"].get("device") or s["hardware"].get("cpu") or ""
            return f"{s['world_size']} ranks, {s['dtype']}, seed {s['seed']}, {outcome.steps} steps, {device}".rstrip(
                ", "
            )
    return ""


def comparison_table(outcomes: Sequence[Outcome], title: str) -> Table:
    """A rich table; failed methods are rows that say so."""
    from rich.table import Table

    columns = _columns(outcomes)
    table = Table(title=title, caption="\n".join([_note(outcomes), *_saving(outcomes)]), title_justify="left")
    for number, (name, _) in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for outcome in outcomes:
        table.add_row(*_cells(outcome, columns), style=None if outcome.ok else "red")
    return table


def write_comparison(
    outcomes: Sequence[Outcome], folder: Path, title: str, facts: dict[str, Any]
) -> dict[str, Path]:
    """Write `comparison.json`, `comparison.png` and the self-contained `comparison.html`.

    Args:
        outcomes: the rows.
        folder: where to; made if needed.
        title: heading of picture and page.
        facts: what was compared; stands in the JSON and on the page.

    Returns:
        kind of file -> its path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"comparison.{kind}" for kind in ("json", "png", "html")}
    content = {"title": title, **facts, "methods": [outcome.to_dict() for outcome in outcomes]}
    paths["json"].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot_stacked_bars(
        [(o.label, o.at_peak if o.ok else {}) for o in outcomes], paths["png"], title, note=_note(outcomes)
    )
    paths["html"].write_text(_page(outcomes, title, facts, paths["png"].read_bytes()), encoding="utf-8")
    return paths


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1d2330; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #dde1e8; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tr.failed td { color: #a1242f; }
img { max-width: 100%; }
.scroll { overflow-x: auto; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; }
footer { color: #667; margin-top: 2rem; }
"""


def _page(outcomes: Sequence[Outcome], title: str, facts: dict[str, Any], picture: bytes) -> str:
    columns = _columns(outcomes)
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in columns)
    rows = "\n".join(
        f'<tr class="{"ok" if o.ok else "failed"}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(o, columns))
        + "</tr>"
        for o in outcomes
    )
    failures = "".join(
        f"<dt>{html.escape(o.label)}: {html.escape(o.status)}</dt><dd>{html.escape(o.error)}</dd>"
        for o in outcomes
        if not o.ok
    )
    encoded = base64.b64encode(picture).decode()
    said = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>"
        for key, value in facts.items()
        if value
    )
    saving = "".join(f"<p>{html.escape(line)}</p>" for line in _saving(outcomes))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(_note(outcomes))}</p>
{saving}
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table></div>
<img alt="Peak memory of one rank by kind, a bar for each method" src="data:image/png;base64,{encoded}">
{f"<h2>What failed</h2><dl>{failures}</dl>" if failures else ""}
<h2>What was compared</h2><dl>{said}</dl>
<footer>Peak: the largest sum of live bytes in a tracked step on the rank that needs most. Saved activations, model
states: the most that was held at any time. Sent: payload of all collectives of one rank. GPUs: arithmetic from the
measured peak for the same global batch.</footer>
</body></html>
"""
