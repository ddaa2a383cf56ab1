"""The parts of a run's page, each as plain values for the template."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from slimfit_ds.report.charts import MISSING, Chart, Line, line_chart, short_number
from slimfit_ds.report.run_data import RunData, number, steps_planned
from slimfit_ds.report.schedule_map import schedule_picture
from slimfit_ds.report.series import smooth
from slimfit_ds.report.units import human_bytes, human_seconds

__all__ = [
    "comparison_rows",
    "figures",
    "learning_charts",
    "memory_bars",
    "metric_name",
    "other_charts",
    "schedule",
    "time_bars",
]

KINDS = {
    "parameters": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "saved_activations_dynamic": "saved activations, dynamic",
    "saved_activations_static": "saved activations, static",
    "communication": "communication",
    "working": "working set",
}
HOST_KINDS = {"optimizer_host": "optimizer states on the host"}
PHASES = {
    "data": "data",
    "forward": "forward",
    "backward": "backward",
    "step": "optimizer step",
    "schedule": "schedule",
}
LOWER_IS_BETTER = frozenset({"loss", "perplexity"})


def metric_name(run: RunData) -> str | None:
    """The metric to show: the one that decides the best model, else the first that is no loss."""
    best = run.result.get("best")
    named = best.get("metric") if isinstance(best, dict) else run.facts.get("metric")
    known = [name for e in run.evaluations for name, value in e.metrics.items() if math.isfinite(value)]
    if isinstance(named, str) and named in known:
        return named
    return next((name for name in known if name != "loss"), known[0] if known else None)


def typical_seconds(run: RunData) -> float:
    """Median seconds of a step, without the first two, which pay for allocation and caches."""
    seconds = run.columns["seconds"]
    return _median(seconds[2:] if len(seconds) > 4 else seconds)


def peak_bytes(run: RunData) -> float:
    """Highest memory of a rank so far."""
    stated = number(run.result.get("peak_bytes"))
    seen = run.columns["memory_bytes"]
    return (
        stated if math.isfinite(stated) else float(np.nanmax(seen)) if np.isfinite(seen).any() else math.nan
    )


def final_loss(run: RunData) -> float:
    """Mean training loss of the last tenth of the steps, at least of 10."""
    loss = run.columns["loss"]
    return _mean(loss[-max(10, len(loss) // 10) :])


def frozen_share(run: RunData, *, by_parameters: bool) -> float:
    """Mean share of layers, or of parameters, that did not train in a step."""
    if by_parameters:
        return _mean(run.columns["frozen_parameters"])
    counts = run.active_counts[run.active_counts >= 0]
    return 1 - float(counts.mean()) / len(run.layers) if counts.size and run.layers else math.nan


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
    choose = min if name in LOWER_IS_BETTER else max
    value, step = choose(found, key=lambda pair: pair[0])
    return name, value, step


def tokens_per_second(run: RunData) -> float:
    """Median over the steps; NaN for tasks without tokens."""
    stated = number(run.result.get("tokens_per_second"))
    tokens, seconds = run.columns["tokens"], run.columns["seconds"]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(tokens > 0, tokens / seconds, np.nan)
    return stated if math.isfinite(stated) else _median(rate)


def figures(run: RunData) -> list[dict[str, str]]:
    """The numbers at the head of the page: name, value, remark."""
    tiles: list[dict[str, str]] = []

    def add(name: str, value: float, text: str, remark: str = "") -> None:
        if math.isfinite(value):
            tiles.append({"name": name, "value": text, "remark": remark})

    best = best_metric(run)
    if best is not None:
        last = next(e for e in reversed(run.evaluations) if math.isfinite(e.metrics.get(best[0], math.nan)))
        remark = f"after {best[2]} steps; last {last.metrics[best[0]]:.4g}"
        add(f"best {best[0].replace('_', ' ')}", best[1], f"{best[1]:.4g}", remark)
    add("training loss", final_loss(run), f"{final_loss(run):.4g}", "mean of the last tenth")
    kind = run.result.get("peak_bytes_are") or run.facts.get("peak_bytes_are")
    add("peak memory of a rank", peak_bytes(run), _bytes(peak_bytes(run)), str(kind or ""))
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


def learning_charts(run: RunData, base: RunData | None) -> list[Chart]:
    """Loss and metric against steps and against seconds."""
    pairs = [(run, "this run", 1)] + ([(base, "baseline", 2)] if base is not None else [])
    charts: list[Chart | None] = []
    for by, label in (("steps", "step"), ("seconds", "seconds of training")):
        lines: list[Line] = []
        for data, name, colour in reversed(pairs):
            x = (data.steps + 1) if by == "steps" else data.elapsed
            loss = data.columns["loss"]
            even = smooth(loss, max(5, len(loss) // 40))
            lines += [
                Line("each step", x, loss, colour, faint=True),
                Line(name, x, even, colour, dashed=colour == 2),
            ]
        charts.append(
            line_chart(
                "Training loss", lines[::-1] if base is None else lines, x_label=label, note="smoothed"
            )
        )
    name = metric_name(run)
    for by, label in (("steps", "step"), ("seconds", "seconds of training")):
        if name is None:
            break
        lines = []
        for data, who, colour in reversed(pairs):
            points = [e for e in data.evaluations if name in e.metrics]
            x = np.array([e.step if by == "steps" else e.seconds for e in points], np.float64)
            y = np.array([e.metrics[name] for e in points], np.float64)
            lines.append(Line(who, x, y, colour, marks=True, dashed=colour == 2))
        charts.append(line_chart(_title(name), lines, x_label=label, note="evaluation"))
    return [chart for chart in charts if chart is not None]


def other_charts(run: RunData) -> list[Chart]:
    """Learning rate, gradient norm, frozen share and size of the updates."""
    x = run.steps + 1
    columns = run.columns
    norm = columns["gradient_norm"]
    charts = [
        line_chart("Learning rate", [Line("learning rate", x, columns["lr"])], x_label="step", floor=0.0),
        line_chart(
            "Gradient norm",
            [
                Line("each step", x, norm, 1, faint=True),
                Line("gradient norm", x, smooth(norm, max(5, len(norm) // 40)), 1),
            ],
            x_label="step",
            note="smoothed",
            floor=0.0,
        ),
    ]
    if run.freezes and run.layers:
        counts = np.where(run.active_counts >= 0, run.active_counts, np.nan)
        lines = [Line("layers", x, 1 - counts / len(run.layers), 1)]
        lines.append(Line("parameters", x, columns["frozen_parameters"], 2))
        charts.append(
            line_chart(
                "Frozen share", lines, x_label="step", floor=0.0, ceiling=1.0, show_y=lambda v: f"{v:.0%}"
            )
        )
        charts.append(_statistics_chart(run))
    memory = columns["memory_bytes"]
    if np.isfinite(memory).any():
        charts.append(
            line_chart(
                "Peak memory so far", [Line("one rank", x, memory)], x_label="step", floor=0.0, show_y=_bytes
            )
        )
    return [chart for chart in charts if chart is not None]


def _statistics_chart(run: RunData) -> Chart | None:
    rows, values = run.trained[:, 0], run.statistics
    known = np.isfinite(values)
    rows, values = rows[known], values[known]
    if not len(rows):
        return None
    order = np.lexsort((values, rows))
    rows, values = rows[order], values[order]
    starts = np.flatnonzero(np.r_[True, np.diff(rows) > 0])
    stops = np.r_[starts[1:], len(rows)]
    low, middle, high = (np.full(len(run.steps), np.nan) for _ in range(3))
    at = rows[starts]
    low[at], high[at], middle[at] = values[starts], values[stops - 1], values[(starts + stops - 1) // 2]
    for column in (low, middle, high):
        column[~(column > 0)] = np.nan
    x, span = run.steps + 1, max(5, len(run.steps) // 40)
    return line_chart(
        "Size of the updates",
        [
            Line(name, x, 10 ** smooth(np.log10(values), span), colour)
            for name, values, colour in (("largest", high, 6), ("median", middle, 1), ("smallest", low, 3))
        ],
        x_label="step",
        note="statistic of the layers that trained, smoothed",
        log=True,
    )


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
    height = 15 if layers <= 60 else 9 if layers <= 130 else 4
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
        "summary": f"{layers} layers, {steps} steps. "
        f"A layer trained in {times.min() / steps:.1%} to {times.max() / steps:.1%} of the steps"
        + (f"; {never} never trained." if never else "; every layer trained."),
    }


def memory_bars(run: RunData, base: RunData | None) -> list[dict[str, Any]]:
    """Groups of stacked bars of bytes by kind: at the peak of a tracked step, and held between steps."""
    pairs = [("this run", run)] + ([("baseline", base)] if base is not None else [])
    tracked = [(name, _tracked(data)) for name, data in pairs]
    held = [(name, _held(data)) for name, data in pairs]
    groups = [
        _bars("At the peak of a tracked step, on the device", tracked, KINDS),
        _bars("Held between steps, on the device", held, KINDS),
        _bars("Held between steps, in host memory", held, HOST_KINDS),
    ]
    return [group for group in groups if group is not None]


def _tracked(run: RunData) -> dict[str, float]:
    memory = run.measures.get("memory")
    peak = memory.get("at_peak") if isinstance(memory, dict) else None
    return {k: number(v) for k, v in peak.items()} if isinstance(peak, dict) else {}


def _held(run: RunData) -> dict[str, float]:
    stated = run.result.get("memory")
    if isinstance(stated, dict):
        return {k: number(v) for k, v in stated.items()}
    found = {}
    for kind, column in run.memory.items():
        finite = column[np.isfinite(column)]
        if finite.size:
            found[kind] = float(finite[-1])
    return found


def time_bars(run: RunData, base: RunData | None) -> dict[str, Any] | None:
    """Median seconds of a step by phase, as stacked bars."""
    pairs = [("this run", run)] + ([("baseline", base)] if base is not None else [])
    rows = []
    for name, data in pairs:
        parts = {
            phase: _median(column[2:] if len(column) > 4 else column) for phase, column in data.times.items()
        }
        parts = {phase: value for phase, value in parts.items() if math.isfinite(value)}
        if parts:
            # What no phase covers: waiting for the other ranks and reading the loss.
            parts["other"] = max(0.0, typical_seconds(data) - sum(parts.values()))
        rows.append((name, parts))
    return _bars("Median step", rows, {**PHASES, "other": "other"}, show=human_seconds)


def _bars(
    title: str,
    rows: Iterable[tuple[str, dict[str, float]]],
    kinds: dict[str, str],
    show: Any = human_bytes,
) -> dict[str, Any] | None:
    """Stacked horizontal bars with a legend; None if there is nothing to show."""
    kept = []
    for name, parts in rows:
        sound = {k: parts[k] for k in kinds if parts.get(k, 0) > 0 and math.isfinite(parts[k])}
        if sound:
            kept.append((name, sound))
    if not kept:
        return None
    longest = max(sum(parts.values()) for _, parts in kept)
    order = [kind for kind in kinds if any(kind in parts for _, parts in kept)]
    colours = {kind: number % 7 + 1 for number, kind in enumerate(kinds)}
    bars = [
        {
            "name": name,
            "total": show(sum(parts.values())),
            "parts": [
                {
                    "label": kinds[kind],
                    "value": show(parts[kind]),
                    "share": f"{parts[kind] / sum(parts.values()):.1%}",
                    "width": f"{100 * parts[kind] / longest:.3f}",
                    "colour": colours[kind],
                }
                for kind in order
                if kind in parts
            ],
        }
        for name, parts in kept
    ]
    table = [
        {
            "label": kinds[kind],
            "colour": colours[kind],
            "cells": [
                f"{show(parts[kind])} ({parts[kind] / sum(parts.values()):.1%})" if kind in parts else MISSING
                for _, parts in kept
            ],
        }
        for kind in order
    ]
    return {"title": title, "bars": bars, "table": table, "names": [name for name, _ in kept]}


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
                "ratio": f"{ratio:.2f}\N{MULTIPLICATION SIGN}" if math.isfinite(ratio) else MISSING,
                "verdict": verdict,
            }
        )

    def exact(value: float) -> str:
        return f"{value:.4g}"

    mine, other = best_metric(run), best_metric(base)
    if mine is not None and other is not None and mine[0] == other[0]:
        lower = mine[0] in LOWER_IS_BETTER
        add(f"best {mine[0].replace('_', ' ')}", mine[1], other[1], exact, "lower" if lower else "higher")
    add("training loss, last tenth", final_loss(run), final_loss(base), exact, "lower")
    add("time per step", typical_seconds(run), typical_seconds(base), human_seconds, "lower")
    add("peak memory of a rank", peak_bytes(run), peak_bytes(base), human_bytes, "lower")
    pairs = [(_held(run), _held(base), "held between steps")]
    tracked = _tracked(run), _tracked(base)
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


def shorten(names: list[str]) -> list[str]:
    """Names without the beginning and end that all of them (or nearly all) share."""
    short = [name.removesuffix(".weight") for name in names]
    heads = [name.split(".", 1)[0] for name in short]
    common = max(set(heads), key=heads.count, default="")
    if common and not common.isdecimal() and heads.count(common) > 0.8 * len(heads):
        cut = [name.removeprefix(f"{common}.") for name in short]
        if len(set(cut)) == len(cut):
            short = cut
    return short


def human_time(seconds: float) -> str:
    """`48 s`, `12 min 5 s`, `3 h 20 min`."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 60:
        return human_seconds(seconds)
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _title(metric: str) -> str:
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]


def _bytes(value: float) -> str:
    return human_bytes(value) if math.isfinite(value) else MISSING


def _median(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan
