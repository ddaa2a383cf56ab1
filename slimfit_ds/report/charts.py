"""Line charts as plain numbers for a template: paths in a box of 1000 x 1000, ticks in per cent.

The box is stretched to the width of the page; words stand beside it as HTML, so that they stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimfit_ds.report.series import decimate, log_ticks, nice_ticks

__all__ = ["MISSING", "Chart", "Line", "line_chart", "short_number"]

MISSING = "\N{EN DASH}"
"""Stands where a number is not known."""
POINTS = 500
"""Points drawn of a line; a chart is some 500 pixels wide."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        name: for the legend and the reader of values.
        x: `[n]`, growing.
        y: `[n]`, NaN where nothing is known.
        colour: 1 to 6, a colour of the page.
        faint: drawn thin behind the others, without a legend.
        marks: draw a dot at each point.
        dashed: a line of dashes (baselines).
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 1
    faint: bool = False
    marks: bool = False
    dashed: bool = False


@dataclass
class Chart:
    """A chart ready for the template; see `line_chart`."""

    title: str
    note: str
    x_label: str
    summary: str
    lines: list[dict[str, object]] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    data: dict[str, object] = field(default_factory=dict)


def short_number(value: float) -> str:
    """`0.123`, `12.3`, `1200`, `120k`, `3.4e-05`: four characters or so."""
    if not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e9 or size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k" if size < 999_500 else "1M"
    return f"{value:.4g}" if size >= 100 else f"{value:.3g}"


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    note: str = "",
    log: bool = False,
    floor: float | None = None,
    ceiling: float | None = None,
    unit: float = 1.0,
    show_y: Callable[[float], str] = short_number,
    show_x: Callable[[float], str] = short_number,
) -> Chart | None:
    """A chart of lines.

    Args:
        title: its heading.
        lines: what to draw; lines without a finite point are left out.
        x_label: what the horizontal axis is.
        note: a remark beside the title.
        log: logarithmic vertical axis; values that are not positive are left out.
        floor, ceiling: bounds that the vertical axis should reach.
        unit: ticks are round multiples of it.
        show_y, show_x: values as text.

    Returns:
        the chart; None if there is no finite point.
    """
    drawn = []
    for line in lines:
        y = np.where(line.y > 0, line.y, np.nan) if log else line.y
        if np.isfinite(y).any():
            drawn.append((line, *decimate(np.asarray(line.x, np.float64), np.asarray(y, np.float64), POINTS)))
    if not drawn:
        return None
    low_x = min(float(x[0]) for _, x, _ in drawn)
    high_x = max(float(x[-1]) for _, x, _ in drawn)
    if not high_x > low_x:
        low_x, high_x = low_x - 0.5, high_x + 0.5
    low, high = _range([(line.faint, y) for line, _, y in drawn], log, floor, ceiling)
    scale = np.log10 if log else np.asarray

    def at_x(x: Any) -> Any:
        return (x - low_x) / (high_x - low_x) * 1000

    def at_y(y: Any) -> Any:
        return 1000 - (scale(y) - scale(low)) / (scale(high) - scale(low)) * 1000

    chart = Chart(title, note, x_label, _summary(title, [line for line, *_ in drawn], x_label, show_y))
    for line, x, y in drawn:
        px, py = at_x(x), np.clip(at_y(y), -2000, 3000)
        chart.lines.append(
            {
                "name": line.name,
                "colour": line.colour,
                "faint": line.faint,
                "dashed": line.dashed,
                "path": _path(px, py),
                "dots": _dots(px, py, line.marks),
            }
        )
    ticks = log_ticks(low, high) if log else [t * unit for t in nice_ticks(low / unit, high / unit)]
    chart.y_ticks = [(float(at_y(np.float64(t))) / 10, show_y(t)) for t in ticks]
    chart.x_ticks = [(float(at_x(np.float64(t))) / 10, show_x(t)) for t in nice_ticks(low_x, high_x, 4)]
    chart.data = {
        "x": x_label,
        "series": [
            {
                "name": line.name,
                "colour": line.colour,
                "points": [
                    [round(float(px), 1), round(float(py), 1), show_x(float(vx)), show_y(float(vy))]
                    for px, py, vx, vy in zip(at_x(x), at_y(y), x, y, strict=True)
                    if math.isfinite(vy)
                ],
            }
            for line, x, y in sorted(
                ((ln, *decimate(xx, yy, 240)) for ln, xx, yy in drawn if not ln.faint),
                key=lambda entry: entry[0].colour,
            )
        ],
    }
    return chart


def _range(
    lines: Sequence[tuple[bool, np.ndarray]], log: bool, floor: float | None, ceiling: float | None
) -> tuple[float, float]:
    """Bounds of the vertical axis: all of the firm lines, and of the faint ones all but their spikes."""
    bounds: list[float] = []
    for faint, y in lines:
        values = y[np.isfinite(y)]
        inner = (
            np.quantile(values, (0.01, 0.99)) if faint and values.size > 20 else (values.min(), values.max())
        )
        bounds += [float(inner[0]), float(inner[1])]
    low, high = min(bounds), max(bounds)
    if log:
        low, high = 10 ** math.floor(math.log10(low) + 1e-9), 10 ** math.ceil(math.log10(high) - 1e-9)
        return (low, high) if high > low else (low / 10, high * 10)
    low = low if floor is None else min(low, floor)
    high = high if ceiling is None else max(high, ceiling)
    if not high > low:
        return low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    margin = 0.05 * (high - low)
    return (
        low if floor is not None and low >= floor else low - margin,
        high if ceiling is not None and high <= ceiling else high + margin,
    )


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path; a NaN lifts the pen."""
    parts, drawing = [], False
    for px, py in zip(x.tolist(), y.tolist(), strict=True):
        if not math.isfinite(py):
            drawing = False
            continue
        parts.append(f"{'L' if drawing else 'M'}{px:.1f} {py:.1f}")
        drawing = True
    return "".join(parts)


def _dots(x: np.ndarray, y: np.ndarray, marks: bool) -> str:
    """Lines of no length, which round caps turn into dots that no stretching deforms."""
    finite = np.isfinite(y)
    if marks and finite.sum() <= 60:
        shown = finite
    else:
        before, after = np.r_[False, finite[:-1]], np.r_[finite[1:], False]
        shown = finite & ~before & ~after
    return "".join(f"M{px:.1f} {py:.1f}h0" for px, py in zip(x[shown], y[shown], strict=True))


def _summary(title: str, lines: Sequence[Line], x_label: str, show: Callable[[float], str]) -> str:
    """What the chart says, for those who cannot see it."""
    parts = []
    for line in lines:
        if line.faint:
            continue
        y = line.y[np.isfinite(line.y)]
        parts.append(
            f"{line.name} from {show(float(y[0]))} to {show(float(y[-1]))}, "
            f"lowest {show(float(y.min()))}, highest {show(float(y.max()))}"
        )
    return f"{title}, by {x_label}: {'; '.join(parts)}"
