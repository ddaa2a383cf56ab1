"""Fixed Lloyd-Max codebooks for N(0, 1): normalised inputs need no scales."""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch

from slimfit_ds.activations.codecs.magnitude_table import MagnitudeCells, MagnitudeTableCodec

__all__ = ["NormalCodebook", "lloyd_max_normal"]


class NormalCodebook(MagnitudeTableCodec):
    """Rounds to the levels of least mean squared error for N(0, 1) data.

    Not unbiased: each level is the mean of its cell, so the decoded values have a smaller second moment, by
    exactly the mean squared error.

    Args:
        name: the registered name.
        bits: 1, 2 or 4.
    """

    def __init__(self, name: str, bits: int):
        super().__init__(name, lloyd_max_normal(bits))


@cache
def lloyd_max_normal(bits: int) -> MagnitudeCells:
    """The optimal quantiser of N(0, 1) with 2^bits levels, thresholds rounded to bf16.

    Lloyd's fixed point in closed form: a level is the mean of its cell, `(pdf(a) - pdf(b)) / (cdf(b) - cdf(a))`,
    a threshold is the middle of two levels. Rounding the thresholds to bf16 changes the mean squared error
    only in second order; the levels are the means of the rounded cells.

    Source: J. Max, "Quantizing for minimum distortion", 1960; S. Lloyd, 1957 (1982).
    """
    cells = 1 << (bits - 1)
    levels = [3.0 * (i + 0.5) / cells for i in range(cells)]
    thresholds: list[float] = []
    change = 1.0
    while change > 1e-13:
        thresholds = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
        previous, levels = levels, _cell_means(thresholds)
        change = max(abs(a - b) for a, b in zip(previous, levels, strict=True))
    rounded = [torch.tensor(t).to(torch.bfloat16).item() for t in thresholds]
    means = _cell_means(rounded)
    return MagnitudeCells(bits, tuple(rounded), tuple(means + [-m for m in means]))


def _cell_means(thresholds: list[float]) -> list[float]:
    """Means of N(0, 1) over the cells between 0, the thresholds and infinity."""
    edges = [0.0, *thresholds, math.inf]
    density = [math.exp(-t * t / 2) / math.sqrt(2 * math.pi) for t in edges]
    upper_tail = [math.erfc(t / math.sqrt(2)) / 2 for t in edges]
    return [
        (density[i] - density[i + 1]) / (upper_tail[i] - upper_tail[i + 1])
        for i in range(len(thresholds) + 1)
    ]
