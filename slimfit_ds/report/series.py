"""Long series made short enough to draw, without losing their spikes."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

__all__ = ["decimate", "log_ticks", "nice_ticks", "smooth"]


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Exponential moving average without the pull of its start; NaN values are passed over.

    Args:
        values: `[n]`.
        span: steps over which the weights fall to about an eighth.

    Returns:
        `[n]`; NaN before the first finite value.
    """
    keep = 1 - 2 / (max(1, span) + 1)
    total, weight = 0.0, 0.0
    out = np.empty(len(values))
    for i, value in enumerate(values.tolist()):
        if value == value:
            total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight if weight else np.nan
    return out


def decimate(x: np.ndarray, y: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest point of each of equal stretches, so that no spike is lost.

    A stretch without a finite value keeps one NaN, so that the gap is seen.

    Args:
        x: `[n]`, growing.
        y: `[n]`, may hold NaN.
        most: points to keep, about.

    Returns:
        both, shorter.
    """
    if len(y) <= most:
        return x, y
    chosen: list[int] = []
    edges = np.linspace(0, len(y), max(1, most // 2) + 1).astype(int)
    for start, stop in pairwise(edges.tolist()):
        part = y[start:stop]
        if np.isnan(part).all():
            chosen.append(start)
        else:
            chosen += sorted({start + int(np.nanargmin(part)), start + int(np.nanargmax(part))})
    if chosen[-1] != len(y) - 1:
        chosen.append(len(y) - 1)
    picked = np.array(chosen)
    return x[picked], y[picked]


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers within `[low, high]`, steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, about)
    power = 10.0 ** np.floor(np.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = np.ceil(low / step - 1e-9)
    count = int(np.floor(high / step + 1e-9) - first) + 1
    return [float((first + i) * step) for i in range(max(0, count))]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten within `[low, high]`, every second or third of them if there are many."""
    first, last = int(np.ceil(np.log10(low) - 1e-9)), int(np.floor(np.log10(high) + 1e-9))
    stride = max(1, -(-(last - first + 1) // most))
    return [10.0**p for p in range(first, last + 1, stride)]
