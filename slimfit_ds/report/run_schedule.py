"""Which layers trained when, and how often."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from slimfit_ds.report.charts import short_number
from slimfit_ds.report.run_data import RunData
from slimfit_ds.report.schedule_map import schedule_picture

__all__ = ["schedule", "shorten"]


def schedule(run: RunData) -> dict[str, Any] | None:
    """The map of layers and steps, and how often each layer trained; None without freezing."""
    if not run.freezes or not run.layers or not len(run.steps):
        return None
    picture, per_column = schedule_picture(run)
    steps, layers = len(run.steps), len(run.layers)
    times = np.bincount(run.trained[:, 1], minlength=layers)
    most = max(1, int(times.max()))
    last = np.full(layers, np.nan)
    last[run.trained[:, 1]] = run.statistics
    sizes = run.layer_sizes
    names = shorten(run.layers)
    height = 15 if layers <= 60 else 9 if layers <= 130 else 3
    every = max(1, -(-12 // height))
    rows = [
        {
            "name": full,
            "short": short,
            "labelled": number % every == 0,
            "times": int(count),
            "share": f"{count / steps:.1%}",
            "width": f"{100 * count / most:.1f}",
            "parameters": f"{sizes[full]:,}" if full in sizes else "",
            "statistic": short_number(float(value)),
        }
        for number, (full, short, count, value) in enumerate(zip(run.layers, names, times, last, strict=True))
    ]
    never = int((times == 0).sum())
    return {
        "picture": picture,
        "rows": rows,
        "row_height": height,
        "height": height * layers,
        "most": f"{most / steps:.0%}",
        "first": int(run.steps[0]) + 1,
        "last": int(run.steps[-1]) + 1,
        "per_column": per_column,
        "sizes": bool(sizes),
        "summary": f"{layers} layers, {steps:,} steps. "
        f"A layer trained in {times.min() / steps:.1%} to {times.max() / steps:.1%} of the steps"
        + (f"; {never} never trained." if never else "; every layer trained."),
    }


def shorten(names: Sequence[str]) -> list[str]:
    """Names without what (nearly) all of them share: first word, last word, the word before the number of a block."""
    short = [name.removesuffix(".weight") for name in names]
    for pattern in (r"^[^.\d]+\.", r"^[^.\d]+\.(?=\d+\.)"):
        heads = [match.group() if (match := re.match(pattern, name)) else "" for name in short]
        known = [head for head in heads if head]
        common = max(set(known), key=known.count, default="")
        among = len(short) if pattern == r"^[^.\d]+\." else len(known)
        cut = [name.removeprefix(common) for name in short]
        if common and known.count(common) > 0.8 * among and len(set(cut)) == len(cut):
            short = cut
    return short
