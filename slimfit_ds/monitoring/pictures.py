"""The freeze schedule as a plain picture for TensorBoard and W&B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from slimfit_ds.report.schedule_plot import merge_columns, schedule_matrix

__all__ = ["schedule_image"]

SMALL, LARGE = np.array([253, 231, 37]), np.array([68, 1, 84])
"""Colours of the smallest and the largest update."""


def schedule_image(history: Sequence[Mapping[str, Any]], layers: Sequence[str], scale: int = 3) -> np.ndarray:
    """`[height, width, 3]` uint8: rows are layers, columns steps; white is frozen.

    Args:
        history: lines with `active_layers` and `statistics`, in the order of steps.
        layers: the rows, in model order.
        scale: pixels of a row.
    """
    matrix = merge_columns(schedule_matrix(history, layers))
    trained = np.isfinite(matrix)
    positive = matrix[trained & (matrix > 0)]
    low, high = (
        np.log(positive.min() if positive.size else 1e-8),
        np.log(positive.max() if positive.size else 1.0),
    )
    size = (np.log(np.where(trained & (matrix > 0), matrix, np.exp(low))) - low) / max(high - low, 1e-9)
    colours = SMALL + size[..., None] * (LARGE - SMALL)
    picture = np.where(trained[..., None], colours, 255).astype(np.uint8)
    # Narrow is enough for many steps: encoding a large picture takes as long as a small step.
    across = max(1, min(scale, 600 // max(1, matrix.shape[1])))
    return picture.repeat(scale, axis=0).repeat(across, axis=1)
