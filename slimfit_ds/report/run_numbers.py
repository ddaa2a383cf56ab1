"""The numbers of a run, each worked out in one place."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from slimfit_ds.report.run_data import RunData, number

__all__ = [
    "best_metric",
    "final_loss",
    "frozen_share",
    "held_bytes",
    "lower_is_better",
    "median_of",
    "metric_name",
    "peak_bytes",
    "tokens_per_second",
    "tracked_bytes",
    "typical_seconds",
]

_LOWER_IS_BETTER = re.compile(r"loss$|perplexity$|error$")
_NO_METRIC = re.compile(r"runtime$|_per_second$|_time$|^epoch$")
"""What a Trainer reports beside the metrics."""


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of this metric is the better one."""
    return _LOWER_IS_BETTER.search(metric) is not None


def metric_name(run: RunData) -> str | None:
    """The metric to show: the one that decides the best model, else the first that is no loss."""
    best = run.result.get("best")
    named = best.get("metric") if isinstance(best, dict) else run.facts.get("metric")
    known = [name for e in run.evaluations for name, value in e.metrics.items() if math.isfinite(value)]
    if isinstance(named, str) and named in known:
        return named
    known = [name for name in known if not _NO_METRIC.search(name)]
    return next((name for name in known if not lower_is_better(name)), known[0] if known else None)


def best_metric(run: RunData) -> tuple[str, float, int] | None:
    """Name, best value and the steps done when it was reached."""
    name = metric_name(run)
    if name is None:
        return None
    found = [
        (e.metrics[name], e.step) for e in run.evaluations if math.isfinite(e.metrics.get(name, math.nan))
    ]
    if not found:
        return None
    choose = min if lower_is_better(name) else max
    value, step = choose(found, key=lambda pair: pair[0])
    return name, value, step


def final_loss(run: RunData) -> float:
    """Mean training loss of the last tenth of the steps, at least of 10."""
    loss = run.columns["loss"]
    return mean_of(loss[-max(10, len(loss) // 10) :])


def typical_seconds(run: RunData) -> float:
    """Median seconds of a step, without the first two, which pay for allocation and caches."""
    seconds = run.columns["seconds"]
    return median_of(seconds[2:] if len(seconds) > 4 else seconds)


def tokens_per_second(run: RunData) -> float:
    """Median over the steps; NaN for tasks without tokens."""
    stated = number(run.result.get("tokens_per_second"))
    tokens, seconds = run.columns["tokens"], run.columns["seconds"]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(tokens > 0, tokens / seconds, np.nan)
    return stated if math.isfinite(stated) else median_of(rate)


def peak_bytes(run: RunData) -> float:
    """Highest memory of a rank so far."""
    stated = number(run.result.get("peak_bytes"))
    seen = run.columns["memory_bytes"]
    return (
        stated if math.isfinite(stated) else float(np.nanmax(seen)) if np.isfinite(seen).any() else math.nan
    )


def frozen_share(run: RunData, *, by_parameters: bool) -> float:
    """Mean share of layers, or of parameters, that did not train in a step."""
    if by_parameters:
        return mean_of(run.columns["frozen_parameters"])
    counts = run.active_counts[run.active_counts >= 0]
    return 1 - float(counts.mean()) / len(run.layers) if counts.size and run.layers else math.nan


def tracked_bytes(run: RunData) -> dict[str, float]:
    """Bytes by kind at the peak of a tracked step; empty if no step was tracked."""
    memory = run.measures.get("memory")
    peak = memory.get("at_peak") if isinstance(memory, dict) else None
    return {k: number(v) for k, v in peak.items()} if isinstance(peak, dict) else _latest(run.peak)


def held_bytes(run: RunData) -> dict[str, float]:
    """Bytes by kind that are held between steps."""
    stated = run.result.get("memory")
    return {k: number(v) for k, v in stated.items()} if isinstance(stated, dict) else _latest(run.memory)


def _latest(columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    known = {kind: column[np.isfinite(column)] for kind, column in columns.items()}
    return {kind: float(values[-1]) for kind, values in known.items() if values.size}


def median_of(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def mean_of(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan
