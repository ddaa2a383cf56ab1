"""The freeze schedule as a small picture with one pixel for each layer and stretch of steps."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from slimfit_ds.report.run_data import RunData

__all__ = ["MOST_COLUMNS", "schedule_picture"]

MOST_COLUMNS = 900
"""Columns of the picture; beyond it several steps share one."""
SHADES, WEIGHTS = 12, 6
RAMP = np.array(
    [(158, 197, 244), (86, 150, 232), (42, 108, 201), (74, 58, 167), (150, 40, 140), (214, 64, 90)]
)
"""Small to large update, RGB; distinct on white and on black."""


def schedule_picture(run: RunData) -> tuple[str, int]:
    """A PNG as a data address: rows are layers, columns steps, clear where frozen.

    The colour is the largest statistic of the stretch on a logarithmic scale, its strength the share of the steps of
    the stretch in which the layer trained, against the largest such share.

    Returns:
        the address, and the steps that one column stands for.
    """
    steps, layers = len(run.steps), max(1, len(run.layers))
    columns = max(1, min(steps, MOST_COLUMNS))
    column = run.trained[:, 0] * columns // max(1, steps)
    cell = run.trained[:, 1] * columns + column
    counts = np.bincount(cell, minlength=layers * columns).reshape(layers, columns)
    width = np.bincount(np.arange(steps) * columns // max(1, steps), minlength=columns)
    share = counts / np.maximum(width, 1)
    positive = run.statistics > 0
    largest = np.zeros(layers * columns)
    np.maximum.at(largest, cell[positive], run.statistics[positive])
    shade = _shades(largest.reshape(layers, columns))
    # A column of many steps is never full: its strongest cells are what strong means.
    strongest = float(np.quantile(share[share > 0], 0.98)) if share.any() else 1.0
    weight = np.minimum((share / strongest * WEIGHTS).astype(int), WEIGHTS - 1)
    indices = np.where(counts > 0, 1 + shade * WEIGHTS + weight, 0).astype(np.uint8)
    return _png(indices), -(-steps // columns) if steps else 1


def _shades(largest: np.ndarray) -> np.ndarray:
    positive = largest[largest > 0]
    if not positive.size:
        return np.zeros(largest.shape, int)
    # The outermost values would leave a single colour for all the others.
    low, high = np.log(np.quantile(positive, (0.02, 0.98)))
    scaled = (np.log(np.where(largest > 0, largest, np.exp(low))) - low) / max(high - low, 1e-9)
    return np.clip((scaled * SHADES).astype(int), 0, SHADES - 1)


def _png(indices: np.ndarray) -> str:
    at = np.linspace(0, len(RAMP) - 1, SHADES)
    colours = np.stack([np.interp(at, np.arange(len(RAMP)), RAMP[:, c]) for c in range(3)], axis=1)
    palette = np.vstack([[(0, 0, 0)], np.repeat(colours, WEIGHTS, axis=0)]).astype(np.uint8)
    strengths = 80 + 175 * (np.arange(WEIGHTS) + 1) / WEIGHTS
    alpha = bytes([0, *np.tile(strengths, SHADES).astype(np.uint8).tolist()])
    picture = Image.fromarray(indices, mode=None)
    picture = picture.convert("P") if picture.mode != "P" else picture
    picture.putpalette(palette.tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True, transparency=alpha)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
