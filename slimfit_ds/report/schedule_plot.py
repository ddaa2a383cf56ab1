"""A picture of the freeze schedule: which layer trained at which step, and how much it changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["merge_columns", "plot_schedule", "schedule_matrix"]

MOST_COLUMNS = 1200
"""Steps are merged beyond this: a picture has no more columns to show."""


def schedule_matrix(history: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> np.ndarray:
    """`[layers, steps]` the statistic of each layer at each step, NaN where it was frozen.

    A layer that trained without a statistic (a skipped step) counts as 0.

    Args:
        history: lines with `active_layers` and `statistics`, in the order of steps.
        layers: the rows, in model order.
    """
    row = {name: number for number, name in enumerate(layers)}
    matrix = np.full((len(layers), len(history)), np.nan)
    for column, line in enumerate(history):
        statistics = line.get("statistics") or {}
        for name in line.get("active_layers") or ():
            matrix[row[name], column] = statistics.get(name) or 0.0
    return matrix


def plot_schedule(history: Sequence[Mapping[str, Any]], layers: Sequence[str], path: Path) -> None:
    """Draw layers against steps; colour is the statistic on a logarithmic scale, white is frozen.

    Args:
        history: the lines of `history.jsonl`.
        layers: every freezable layer, in model order.
        path: the image to write; the suffix decides the format.
    """
    # The object interface needs no global backend, so a caller's own figures are left alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    matrix = schedule_matrix(history, layers)
    shown = merge_columns(matrix)
    height = min(30.0, max(3.0, 0.14 * len(layers) + 1.2))
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    positive = shown[np.isfinite(shown) & (shown > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-8, 1.0)
    drawn = np.where(shown > 0, shown, np.where(np.isnan(shown), np.nan, low))
    image = axes.imshow(
        np.ma.masked_invalid(drawn),
        aspect="auto",
        interpolation="nearest",
        norm=LogNorm(low, high if high > low else low * 10),
        extent=(0, max(1, matrix.shape[1]), len(layers), 0),
        cmap="viridis_r",
    )
    every = max(1, len(layers) // 150)
    axes.set_yticks(
        np.arange(0, len(layers), every) + 0.5, [layers[i] for i in range(0, len(layers), every)], fontsize=5
    )
    trained = np.isfinite(matrix)
    share = trained.mean() if trained.size else 0.0
    axes.set(
        xlabel="optimizer step", title=f"Layers that trained, {share:.1%} of all layer-steps; white is frozen"
    )
    figure.colorbar(image, label="size of the update (statistic)", pad=0.01)
    figure.savefig(path, dpi=130)


def merge_columns(matrix: np.ndarray) -> np.ndarray:
    """At most `MOST_COLUMNS` columns; a merged one shows the largest statistic, frozen only if always frozen."""
    steps = matrix.shape[1]
    if steps <= MOST_COLUMNS:
        return matrix
    edges = np.linspace(0, steps, MOST_COLUMNS + 1).astype(int)
    filled = np.where(np.isnan(matrix), -np.inf, matrix)
    merged = np.maximum.reduceat(filled, edges[:-1], axis=1)
    return np.where(np.isneginf(merged), np.nan, merged)
