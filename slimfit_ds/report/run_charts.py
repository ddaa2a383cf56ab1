"""The curves of a run."""

from __future__ import annotations

import numpy as np

from slimfit_ds.report.charts import Chart, Line, line_chart
from slimfit_ds.report.run_data import RunData
from slimfit_ds.report.run_numbers import metric_name
from slimfit_ds.report.series import smooth
from slimfit_ds.report.units import binary_unit, human_bytes

__all__ = ["learning_charts", "other_charts"]


def learning_charts(run: RunData, base: RunData | None) -> list[Chart]:
    """Loss and metric against steps and against seconds."""
    pairs = [(run, "this run", 1)] + ([(base, "baseline", 2)] if base is not None else [])
    charts: list[Chart | None] = []
    for by, label in (("steps", "step"), ("seconds", "seconds of training")):
        lines: list[Line] = []
        for data, who, colour in reversed(pairs):
            x = (data.steps + 1) if by == "steps" else data.elapsed
            loss = data.columns["loss"]
            even = smooth(loss, max(5, len(loss) // 40))
            lines += [
                Line("each step", x, loss, colour, faint=True),
                Line(who, x, even, colour, dashed=colour == 2),
            ]
        charts.append(line_chart("Training loss", lines, x_label=label, note="smoothed"))
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
                "Peak memory so far",
                [Line("one rank", x, memory)],
                x_label="step",
                floor=0.0,
                show_y=human_bytes,
                unit=binary_unit(float(np.nanmax(memory))),
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


def _title(metric: str) -> str:
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]
