"""Step derivatives against autograd, numerical integration and a search from many starts."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate, stats
from torch import Tensor

from slimfit_ds.activations.codecs import StepDerivative, get_codec
from slimfit_ds.activations.codecs.step_derivative import ACTIVATIONS, find_activation, fit_cells

FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
}
SMOOTH = ("gelu", "gelu_tanh", "silu", "quick_gelu")


def _slope(name: str, x: Tensor) -> Tensor:
    """f'(x) by autograd, float64."""
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[name](x).sum(), x)[0]


def _normal(n: int, scale: float = 1.0) -> Tensor:
    """N(0, scale^2) by its quantiles: a sample without sampling noise."""
    return scale * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def _mse(codec: StepDerivative, name: str, x: Tensor) -> float:
    return (codec.decode(codec.encode(x)) - _slope(name, x)).square().mean().item()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_those_of_autograd(name: str) -> None:
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    torch.testing.assert_close(find_activation(name).derivative(x), _slope(name, x), rtol=1e-12, atol=1e-14)
    assert set(FUNCTIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_symmetry_that_the_cells_use(name: str) -> None:
    x = torch.linspace(0, 9, 1001, dtype=torch.float64)
    torch.testing.assert_close(_slope(name, -x), 1 - _slope(name, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("bits", [1, 4, 5])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_levels_are_the_means_of_their_cells(name: str, bits: int, scale: float) -> None:
    cells = fit_cells(find_activation(name), bits, scale)
    edges = [0.0, *cells.thresholds, 12 * scale]
    density = stats.norm(scale=scale).pdf
    mass, moment = [0.0] * (1 << (bits - 1)), [0.0] * (1 << (bits - 1))
    for (a, b), cell in zip(itertools.pairwise(edges), cells.cells, strict=True):
        mass[cell] += integrate.quad(density, a, b)[0]
        moment[cell] += integrate.quad(
            lambda x: density(x) * _slope(name, torch.tensor(x)).item(), a, b, epsabs=1e-10
        )[0]
    means = [m / w for m, w in zip(moment, mass, strict=True)]
    assert cells.levels == pytest.approx([*means, *(1 - m for m in means)], abs=5e-6)


def _k_means(values: np.ndarray, count: int, starts: int) -> float:
    """The least mean squared error of `count` levels for `values`, by Lloyd's iteration from random starts."""
    values = np.sort(values)
    sums = np.concatenate([[0], values.cumsum()])
    squares = np.concatenate([[0], (values**2).cumsum()])
    random = np.random.default_rng(0)
    best = math.inf
    for _ in range(starts):
        levels = np.sort(random.choice(values, count, replace=False))
        for _ in range(300):
            bounds = np.concatenate(
                [[0], np.searchsorted(values, (levels[1:] + levels[:-1]) / 2), [len(values)]]
            )
            sizes = np.diff(bounds)
            levels = np.where(sizes > 0, np.diff(sums[bounds]) / np.maximum(sizes, 1), levels)
        error = (np.diff(squares[bounds]) - np.diff(sums[bounds]) ** 2 / np.maximum(sizes, 1)).sum()
        best = min(best, error / len(values))
    return best


@pytest.mark.parametrize(("name", "bits"), [("gelu", 4), ("gelu", 5), ("silu", 4), ("quick_gelu", 4)])
def test_cells_are_as_good_as_lloyds_iteration_from_many_starts(name: str, bits: int) -> None:
    found = _k_means(_slope(name, _normal(30_000)).numpy(), 1 << bits, starts=10)
    assert _mse(StepDerivative(name, bits), name, _normal(60_000)) <= found * 1.02


@pytest.mark.parametrize("name", SMOOTH)
def test_error_falls_with_the_bits_and_beats_the_paper(name: str) -> None:
    x = _normal(60_000)
    errors = [_mse(StepDerivative(name, bits), name, x) for bits in (1, 4, 5)]
    assert errors[0] > 9 * errors[1] > 27 * errors[2]
    fixed = get_codec("fixed4")
    paper = (_slope(name, fixed.decode(fixed.encode(x))) - _slope(name, x)).square().mean().item()
    assert errors[1] < 0.25 * paper


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_fitting_to_the_data_helps(scale: float) -> None:
    x = _normal(60_000, scale)
    assert _mse(StepDerivative("gelu", 4, scale=scale), "gelu", x) < 0.95 * _mse(
        StepDerivative("gelu", 4), "gelu", x
    )


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_relu_is_exact(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    x[:3] = torch.tensor([0.0, -0.0, 1e-30])
    codec = StepDerivative("relu", bits)
    assert torch.equal(codec.decode(codec.encode(x)), (x > 0).to(dtype))


@pytest.mark.parametrize("factor", [1e-3, 1.0, 50.0])
def test_relu2_follows_the_scale_of_the_data(factor: float) -> None:
    x = _normal(20_000).float() * factor
    codec = StepDerivative("relu2", 4)
    y = codec.decode(codec.encode(x))
    assert (y[x <= 0] == 0).all()
    relative = (y - _slope("relu2", x)).norm() / _slope("relu2", x).norm()
    # 15 cells for the positive half, as many as a 4.9 bit quantiser of a half-normal number has.
    assert relative < 0.06
    kept = codec.encode(torch.zeros(10))
    assert torch.equal(codec.decode(kept), torch.zeros(10))


def test_relu2_shows_non_finite_inputs() -> None:
    codec = StepDerivative("relu2", 4)
    for bad in (math.inf, math.nan):
        x = torch.ones(10)
        x[3] = bad
        assert codec.decode(codec.encode(x))[3].isnan()


def test_gelu_saturates() -> None:
    codec = StepDerivative("gelu", 4)
    x = torch.tensor([math.inf, -math.inf, 1e6, -1e6])
    y = codec.decode(codec.encode(x))
    assert torch.equal(y[:2], y[2:])
    torch.testing.assert_close(y, torch.tensor([1.0, 0.0, 1.0, 0.0]), atol=0.03, rtol=0)


def test_aliases() -> None:
    assert find_activation("gelu_new") is ACTIVATIONS["gelu_tanh"]
    assert get_codec("step4", activation="swish").cells == get_codec("step4", activation="silu").cells


@pytest.mark.parametrize(("name", "bits"), [("gelu", 5), ("gelu", 1), ("relu", 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_number_falls_into_its_cell(name: str, bits: int, dtype: torch.dtype) -> None:
    """All bf16 numbers, and for fp32 the neighbours of every threshold: by comparing with each threshold."""
    codec = StepDerivative(name, bits)
    cells = codec.cells
    if dtype == torch.bfloat16:
        x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        x = x[~x.isnan()]
    else:
        near = torch.tensor(cells.thresholds)
        x = torch.cat([near, near.nextafter(torch.tensor(0.0)), near.nextafter(torch.tensor(99.0))])
        x = torch.cat([x, -x])
    interval = sum((x.double().abs() >= t).long() for t in cells.thresholds) + torch.zeros(len(x)).long()
    cell = torch.tensor(cells.cells)[interval]
    if cells.signed:
        cell = cell + x.signbit() * (1 << (bits - 1))
    else:
        cell = torch.where(x.signbit(), 0, cell)
    assert torch.equal(codec.decode(codec.encode(x)), torch.tensor(cells.levels)[cell].to(dtype))
