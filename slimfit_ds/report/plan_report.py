"""A plan as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slimfit_ds.report.units import human_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["PlanRow", "plan_table"]


@dataclass(frozen=True)
class PlanRow:
    """One setting of a plan.

    Args:
        label: the setting.
        needs: bytes on the device; None: not known.
        fits: whether it fits.
        parts: bytes by kind at the peak.
        host: bytes of optimizer states on the host.
        error_class: expected relative error of the gradients.
        bound: `needs` is only a lower bound (model states by arithmetic).
        chosen: this is the recommendation.
        problem: why there is no estimate.
    """

    label: str
    needs: int | None
    fits: bool
    parts: dict[str, int]
    host: int = 0
    error_class: str = "none"
    bound: bool = False
    chosen: bool = False
    problem: str = ""


def plan_table(rows: Sequence[PlanRow], title: str, caption: str) -> Table:
    """A rich table of settings; the chosen one is marked."""
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for name in (
        "setting",
        "needs",
        "weights",
        "gradients",
        "optimizer",
        "saved",
        "rest",
        "on host",
        "gradient error",
        "fits",
    ):
        table.add_column(
            name, justify="left" if name in ("setting", "gradient error") else "right", overflow="fold"
        )
    for row in rows:
        if row.needs is None:
            table.add_row(row.label, "?", *[""] * 6, row.problem, "", style="red")
            continue
        known = row.parts
        saved = known.get("saved_activations_dynamic", 0) + known.get("saved_activations_static", 0)
        parts = [known.get("parameters", 0), known.get("gradients", 0), known.get("optimizer", 0), saved]
        cells = ["" if row.bound and not part else human_bytes(part) for part in parts]
        rest = "" if row.bound else human_bytes(row.needs - sum(parts))
        style = "bold green" if row.chosen else ("" if row.fits else "dim")
        table.add_row(
            ("-> " if row.chosen else "") + row.label,
            (">= " if row.bound else "") + human_bytes(row.needs),
            *cells,
            rest,
            human_bytes(row.host) if row.host else "",
            row.error_class,
            "yes" if row.fits else "no",
            style=style,
        )
    return table
