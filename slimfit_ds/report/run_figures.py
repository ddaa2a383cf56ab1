"""The head of a run's page, and the table against a baseline."""

from __future__ import annotations

import math
from typing import Any

from slimfit_ds.report.charts import MISSING, short_number
from slimfit_ds.report.run_bars import HOST_KINDS, KINDS
from slimfit_ds.report.run_data import RunData, number, steps_planned
from slimfit_ds.report.run_numbers import (
    best_metric,
    final_loss,
    frozen_share,
    held_bytes,
    lower_is_better,
    peak_bytes,
    tokens_per_second,
    tracked_bytes,
    typical_seconds,
)
from slimfit_ds.report.units import human_bytes, human_seconds

__all__ = ["comparison_rows", "figures", "progress"]


def figures(run: RunData) -> list[dict[str, str]]:
    """The numbers at the head of the page: name, value, remark."""
    tiles: list[dict[str, str]] = []

    def add(name: str, value: float, text: str, remark: str = "") -> None:
        if math.isfinite(value):
            tiles.append({"name": name, "value": text, "remark": remark})

    best = best_metric(run)
    if best is not None:
        last = next(e for e in reversed(run.evaluations) if math.isfinite(e.metrics.get(best[0], math.nan)))
        remark = f"after {best[2]:,} steps; last {last.metrics[best[0]]:.4g}"
        add(f"best {best[0].replace('_', ' ')}", best[1], f"{best[1]:.4g}", remark)
    add("training loss", final_loss(run), f"{final_loss(run):.4g}", "mean of the last tenth")
    kind = run.result.get("peak_bytes_are") or run.facts.get("peak_bytes_are")
    add("peak memory of a rank", peak_bytes(run), human_bytes(peak_bytes(run)), str(kind or ""))
    layers, parameters = (frozen_share(run, by_parameters=by) for by in (False, True))
    remark = f"{parameters:.1%} of the parameters" if math.isfinite(parameters) else "mean over the steps"
    add("frozen layers", layers, f"{layers:.1%}", remark)
    seconds = typical_seconds(run)
    total = float(run.elapsed[-1]) if len(run.steps) else math.nan
    add("time per step", seconds, human_seconds(seconds), f"median; {human_time(total)} of training")
    rate, samples = tokens_per_second(run), number(run.result.get("samples_per_second"))
    add("tokens per second", rate, short_number(rate), "over all ranks, median")
    if not math.isfinite(rate):
        add("examples per second", samples, short_number(samples), "over all ranks")
    return tiles


def comparison_rows(run: RunData, base: RunData) -> list[dict[str, str]]:
    """Numbers of both runs and their ratio."""
    rows: list[dict[str, str]] = []

    def add(name: str, mine: float, other: float, show: Any, better: str = "") -> None:
        if not (math.isfinite(mine) or math.isfinite(other)):
            return
        texts = [show(value) if math.isfinite(value) else MISSING for value in (mine, other)]
        sound = math.isfinite(mine) and math.isfinite(other) and other != 0
        ratio = mine / other if sound else math.nan
        verdict = ""
        if better and sound and abs(ratio - 1) > 0.005:
            verdict = "better" if (mine < other) == (better == "lower") else "worse"
        rows.append(
            {
                "name": name,
                "mine": texts[0],
                "other": texts[1],
                "ratio": _times(ratio),
                "verdict": verdict,
            }
        )

    def exact(value: float) -> str:
        return f"{value:.4g}"

    mine, other = best_metric(run), best_metric(base)
    if mine is not None and other is not None and mine[0] == other[0]:
        lower = lower_is_better(mine[0])
        add(f"best {mine[0].replace('_', ' ')}", mine[1], other[1], exact, "lower" if lower else "higher")
    add("training loss, last tenth", final_loss(run), final_loss(base), exact, "lower")
    add("time per step", typical_seconds(run), typical_seconds(base), human_seconds, "lower")
    add("peak memory of a rank", peak_bytes(run), peak_bytes(base), human_bytes, "lower")
    pairs = [(held_bytes(run), held_bytes(base), "held between steps")]
    tracked = tracked_bytes(run), tracked_bytes(base)
    if all(tracked):
        pairs.insert(0, (*tracked, "at the peak of a tracked step"))
    for own, others, when in pairs:
        for kind, label in {**KINDS, **HOST_KINDS}.items():
            if own.get(kind) or others.get(kind):
                add(
                    f"{label}, {when}",
                    own.get(kind, math.nan),
                    others.get(kind, math.nan),
                    human_bytes,
                    "lower",
                )
    add("tokens per second", tokens_per_second(run), tokens_per_second(base), short_number, "higher")
    add("steps", len(run.steps), len(base.steps), lambda v: f"{v:.0f}")
    return rows


def progress(run: RunData) -> dict[str, Any]:
    """Steps done, steps planned, and the seconds that are left."""
    done = int(run.steps[-1]) + 1 if len(run.steps) else 0
    planned = steps_planned(run)
    left = (planned - done) * typical_seconds(run) if planned else math.nan
    return {
        "done": done,
        "planned": planned,
        "share": min(1.0, done / planned) if planned else None,
        "left": human_time(left) if planned and planned > done and math.isfinite(left) else "",
    }


def human_time(seconds: float) -> str:
    """`48 s`, `12 min 5 s`, `3 h 20 min`."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return human_seconds(seconds)
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _times(ratio: float) -> str:
    """`0.56x` with a proper sign; small ones keep two digits."""
    if not math.isfinite(ratio):
        return MISSING
    text = f"{ratio:.2f}" if abs(ratio) >= 0.1 else short_number(float(f"{ratio:.2g}"))
    return f"{text}\N{MULTIPLICATION SIGN}"
