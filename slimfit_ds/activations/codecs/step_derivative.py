"""The derivative of an activation function as a step function: 5, 4, 2 or 1 bits instead of the input.

The backward of `f` needs only `f'(x)`. Storing which of a few cells `x` lies in, and multiplying by the mean
of `f'` over that cell, costs fewer bits for the same error than storing `x` coarsely and evaluating `f'` there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from slimfit_ds.activations.codecs.magnitude_table import MagnitudeCells, MagnitudeTableCodec, bf16_pattern

__all__ = ["ACTIVATIONS", "Activation", "StepDerivative", "find_activation", "fit_cells"]


@dataclass(frozen=True)
class Activation:
    """An activation function as its derivative.

    Attributes:
        derivative: f' on float64 tensors.
        antisymmetric: f'(-x) = 1 - f'(x); otherwise f' is 0 for x <= 0.
        scales_with_input: f'(s x) = s f'(x) for s > 0, so that cells fitted to N(0, 1) need the data's scale.
    """

    derivative: Callable[[Tensor], Tensor]
    antisymmetric: bool = True
    scales_with_input: bool = False


def _gelu(x: Tensor) -> Tensor:
    density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return torch.special.ndtr(x) + x * density


def _gelu_tanh(x: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + torch.tanh(inner)) + 0.5 * x * (1 - torch.tanh(inner) ** 2) * slope


def _sigmoid_weighted(x: Tensor, beta: float) -> Tensor:
    gate = torch.sigmoid(beta * x)
    return gate * (1 + beta * x * (1 - gate))


ACTIVATIONS: dict[str, Activation] = {
    "gelu": Activation(_gelu),
    "gelu_tanh": Activation(_gelu_tanh),
    "silu": Activation(lambda x: _sigmoid_weighted(x, 1.0)),
    "quick_gelu": Activation(lambda x: _sigmoid_weighted(x, 1.702)),
    "relu": Activation(lambda x: (x > 0).to(x.dtype), antisymmetric=False),
    "relu2": Activation(lambda x: 2 * torch.relu(x), antisymmetric=False, scales_with_input=True),
}
_ALIASES = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}


def find_activation(name: str) -> Activation:
    """The activation of that name or alias.

    Raises:
        ValueError: the name is unknown.
    """
    known = {**ACTIVATIONS, **{alias: ACTIVATIONS[target] for alias, target in _ALIASES.items()}}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown activation {name!r}{hint} Known: {', '.join(sorted(known))}")
    return known[name]


class StepDerivative(MagnitudeTableCodec):
    """Encodes `x` as the cell it lies in; decodes to the approximate `f'(x)`.

    Infinities and NaN saturate: they decode to the outermost level of their sign. For relu2, whose derivative
    scales with its input, the root mean square of the tensor is stored beside the cells, and a tensor with a
    non-finite element decodes to NaN.

    Args:
        activation: a name in `ACTIVATIONS` or an alias of transformers (gelu_new, swish).
        bits: 1, 2, 4 or 5.
        scale: standard deviation of the inputs that the cells are fitted to, N(0, scale^2).
    """

    def __init__(self, activation: str, bits: int = 4, scale: float = 1.0):
        function = find_activation(activation)
        if bits not in (1, 2, 4, 5):
            raise ValueError(f"bits must be 1, 2, 4 or 5, got {bits}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        self.activation = _ALIASES.get(activation, activation)
        cells = fit_cells(function, bits, float(scale))
        super().__init__(f"{activation}_step{bits}", cells, rms_scaled=function.scales_with_input)


@cache
def fit_cells(activation: Activation, bits: int, scale: float = 1.0) -> MagnitudeCells:
    """The cells of least mean squared error of f' for x ~ N(0, scale^2) among all with bf16 thresholds.

    The optimal quantiser of the value f'(x): by dynamic programming over the intervals between the bf16 numbers
    from 2^-6 to 8 standard deviations, sorted by their mean of f'. Where f' rises and falls (GELU has its peak at
    sqrt(2)), intervals on both sides share a cell.

    Args:
        activation: the function.
        bits: 1, 2, 4 or 5.
        scale: standard deviation of the inputs.
    """
    candidates = _bf16_range(scale * 2.0**-6, scale * 8)
    edges = torch.cat(
        [torch.zeros(1, dtype=torch.float64), candidates, candidates.new_tensor([12.0 * scale])]
    )
    weight, first, second = _moments(activation.derivative, edges, scale)
    # The far tail has no weight that fp64 could divide by; its value is that of its middle.
    value = torch.where(weight > 1e-30, first / weight, activation.derivative((edges[1:] + edges[:-1]) / 2))
    order = value.argsort(stable=True)
    sums = [torch.cat([m.new_zeros(1), m[order].cumsum(0)]) for m in (weight, first, second)]
    count = 1 << (bits - 1) if activation.antisymmetric else (1 << bits) - 1
    bounds = _best_partition(sums[0], sums[1], sums[2], count)
    cell_of = torch.empty_like(order)
    means = []
    for cell, (start, stop) in enumerate(pairwise(bounds)):
        cell_of[order[start:stop]] = cell
        means.append(float(first[order[start:stop]].sum() / weight[order[start:stop]].sum()))
    changes = (cell_of[1:] != cell_of[:-1]).nonzero().flatten() + 1
    thresholds = [float(edges[i]) for i in changes]
    cells = [int(cell_of[0]), *(int(cell_of[i]) for i in changes)]
    if activation.antisymmetric:
        return MagnitudeCells(
            bits, tuple(thresholds), tuple(means + [1 - m for m in means]), cells=tuple(cells)
        )
    smallest = float(torch.tensor([1], dtype=torch.int16).view(torch.bfloat16))
    return MagnitudeCells(
        bits, (smallest, *thresholds), (0.0, *means), signed=False, cells=(0, *(cell + 1 for cell in cells))
    )


def _bf16_range(low: float, high: float) -> Tensor:
    """Every bf16 number from `low` to `high`, as float64."""
    patterns = torch.arange(bf16_pattern(low), bf16_pattern(high) + 1, dtype=torch.int16)
    return patterns.view(torch.bfloat16).to(torch.float64)


def _moments(derivative: Callable[[Tensor], Tensor], edges: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Integrals of p, p f' and p f'^2 over each interval between `edges` [n + 1], p the density of N(0, scale^2).

    By Gauss's rule with three nodes, whose error is far below fp32 resolution on intervals this narrow.
    """
    node = math.sqrt(0.6)
    half = (edges[1:] - edges[:-1]) / 2
    x = (edges[1:] + edges[:-1])[:, None] / 2 + half[:, None] * edges.new_tensor([-node, 0, node])
    weight = half[:, None] * edges.new_tensor([5 / 9, 8 / 9, 5 / 9])
    weight = weight * torch.exp(-((x / scale) ** 2) / 2) / (scale * math.sqrt(2 * math.pi))
    slope = derivative(x)
    return weight.sum(1), (weight * slope).sum(1), (weight * slope**2).sum(1)


def _best_partition(weight: Tensor, first: Tensor, second: Tensor, cells: int) -> list[int]:
    """Bounds [cells + 1] of the consecutive cells with the least summed squared error.

    Args:
        weight, first, second: cumulated moments [n + 1] of the n elementary intervals.
        cells: how many cells to form, at most n.
    """

    def difference(m: Tensor) -> Tensor:
        return m[None, :] - m[:, None]

    error = difference(second) - difference(first) ** 2 / difference(weight).clamp_min(1e-300)
    below = torch.ones_like(error, dtype=torch.bool).tril()
    error = error.clamp_min(0).masked_fill_(below, math.inf)
    best = error[0]
    choices = []
    for _ in range(cells - 1):
        best, choice = (best[:, None] + error).min(0)
        choices.append(choice)
    bounds = [len(weight) - 1]
    for choice in reversed(choices):
        bounds.append(int(choice[bounds[-1]]))
    return [0, *bounds[::-1]]
