"""The rows of a plan: as a table in the terminal, as JSON, and as a page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from slimfit_ds.planner.speed import Speed
from slimfit_ds.report.units import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PlanRow", "page", "table"]


@dataclass(frozen=True)
class PlanRow:
    """One setting of a plan.

    Args:
        label: the setting.
        needs: bytes on the device; None: not known.
        parts: bytes by kind at the peak.
        host: bytes of weights and optimizer states on the host.
        error: expected relative error of the gradients; why there is no estimate, if `needs` is None.
        bound: `needs` is only a lower bound (model states by arithmetic).
        ours: this is a setting of SlimFit.
        chosen: this is the recommendation.
        speed: what a step could reach; None: not known.
    """

    label: str
    needs: int | None
    parts: dict[str, int] = field(default_factory=dict)
    host: int = 0
    error: str = "none"
    bound: bool = False
    ours: bool = False
    chosen: bool = False
    speed: Speed | None = None

    def fits(self, budget: int) -> bool:
        """Whether it fits so many bytes."""
        return self.needs is not None and self.needs <= budget

    @property
    def needs_text(self) -> str:
        """Bytes on the device as people read them."""
        return "?" if self.needs is None else (">= " if self.bound else "") + human_bytes(self.needs)

    def to_dict(self, budget: int) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        pace = self.speed
        rate = None if pace is None else pace.tokens_per_second
        return {
            **asdict(self),
            "fits": self.fits(budget),
            "speed": None if pace is None else {"tokens_per_second": rate, "bound": pace.bound},
        }


def _pace(row: PlanRow) -> tuple[str, str]:
    return ("", "") if row.speed is None else (f"{row.speed.tokens_per_second:,.0f}", row.speed.bound)


def table(rows: Sequence[PlanRow], title: str, caption: str, budget: int, unit: str) -> Table:
    """Return a rich table; the chosen setting is marked.

    Args:
        unit: of the speed, `tokens/s` or `images/s`.
    """
    from rich.table import Table

    made = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in ("setting", "on the GPU", "fits", "on the host", unit, "waits for", "gradient error"):
        left = name in ("setting", "fits", "waits for", "gradient error")
        made.add_column(name, justify="left" if left else "right", overflow="fold")
    for position, row in enumerate(rows):
        style = "bold green" if row.chosen else ("" if row.fits(budget) else "dim")
        cells = [
            ("-> " if row.chosen else "") + row.label,
            row.needs_text,
            "" if row.needs is None else ("yes" if row.fits(budget) else "no"),
            human_bytes(row.host) if row.host else "",
            *_pace(row),
            row.error,
        ]
        ends = position + 1 < len(rows) and rows[position + 1].ours != row.ours
        made.add_row(*cells, style="red" if row.needs is None else style, end_section=ends)
    return made


_COLOURS = {
    "weights": "#4c72b0",
    "gradients": "#dd8452",
    "optimizer states": "#c44e52",
    "saved for backward": "#55a868",
    "working set": "#b8b8b8",
}
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .6rem;text-align:left;border-bottom:1px solid #ddd}
td.n{text-align:right;white-space:nowrap}tr.chosen{background:#e9f6ec;font-weight:600}tr.no{color:#888}
.bar{position:relative;height:.8rem;min-width:14rem;background:#f2f2f2}.bar i{float:left;height:100%}
.bar b{position:absolute;top:-.2rem;bottom:-.2rem;width:2px;background:#222}
.key span{margin-right:1rem}.key i{display:inline-block;width:.8rem;height:.8rem;margin-right:.3rem}"""


def _parts(row: PlanRow) -> dict[str, int]:
    """Return bytes by the kinds of the picture; all of them the working set where only the sum is known."""
    parts = row.parts
    found = {name: parts.get(key, 0) for name, key in zip(_COLOURS, _PLAIN, strict=False)}
    found["saved for backward"] = sum(n for kind, n in parts.items() if kind.startswith("saved_activations"))
    found["working set"] = max((row.needs or 0) - sum(found.values()), 0)
    return found


_PLAIN = ("parameters", "gradients", "optimizer")


def page(rows: Sequence[PlanRow], title: str, caption: str, budget: int, unit: str) -> str:
    """Return the plan as a page of HTML: a bar of memory by kind for each setting, the budget as a line in it."""
    widest = max([budget, *(row.needs or 0 for row in rows if row.fits(4 * budget))])
    lines = []
    for row in rows:
        bars = ""
        for name, size in _parts(row).items():
            share = min(100 * size / widest, 100)
            if share >= 0.1:
                bars += f'<i style="width:{share:.1f}%;background:{_COLOURS[name]}" title="{name}: {human_bytes(size)}"></i>'
        mark = f'<b style="left:{100 * budget / widest:.1f}%"></b>'
        kind = "chosen" if row.chosen else ("" if row.fits(budget) else "no")
        cells = [row.needs_text, human_bytes(row.host) if row.host else "", *_pace(row)]
        numbers = "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells)
        bar = f'<div class="bar" style="overflow:hidden">{bars}{mark}</div>'
        lines.append(
            f'<tr class="{kind}"><td>{escape(row.label)}</td><td>{bar}</td>{numbers}<td>{escape(row.error)}</td></tr>'
        )
    names = ["setting", "", "on the GPU", "on the host", unit, "waits for", "gradient error"]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    key = "".join(
        f'<span><i style="background:{colour}"></i>{name}</span>' for name, colour in _COLOURS.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>\n'
        f'<h1>{escape(title)}</h1><p class="key">{key}<span>| what the GPU has</span></p>\n'
        f"<table><tr>{head}</tr>\n" + "\n".join(lines) + f"\n</table><p>{escape(caption)}</p></html>\n"
    )
