"""Column-row sampling against the full product."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.codecs.crs import ColumnRowSampling, sample_rows


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _weight_gradient(x: Tensor, grad: Tensor, keep: int, generator: torch.Generator) -> Tensor:
    """`grad^T x` from the rows that are kept."""
    index, weight = sample_rows(x, keep, generator)
    return (grad[index] * weight[:, None]).t() @ x[index]


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """Input [96, 6] whose rows differ in size by orders of magnitude, and an output gradient [96, 5]."""
    g = _generator(0)
    x = torch.randn(96, 6, generator=g) * torch.randn(96, 1, generator=g).exp()
    return x, torch.randn(96, 5, generator=g)


@pytest.mark.parametrize("keep", [1, 30, 95])
def test_the_weight_gradient_is_unbiased(problem: tuple[Tensor, Tensor], keep: int) -> None:
    x, grad = problem
    draws, generator = 1000, _generator(1)
    found = torch.stack([_weight_gradient(x, grad, keep, generator) for _ in range(draws)]).double()
    deviation = found.std(0) / math.sqrt(draws)
    assert ((found.mean(0) - grad.double().t() @ x.double()).abs() <= 5 * deviation + 1e-5).all()


def test_winners_lower_the_variance(problem: tuple[Tensor, Tensor]) -> None:
    """Against plain sampling with replacement by the same probabilities."""
    x, grad = problem
    exact = grad.t() @ x
    generator = _generator(2)
    p = x.norm(dim=1) / x.norm(dim=1).sum()

    def plain() -> Tensor:
        index = torch.multinomial(p, 30, replacement=True, generator=generator)
        return (grad[index] / (30 * p[index])[:, None]).t() @ x[index]

    def error(estimate) -> float:  # type: ignore[no-untyped-def]
        return sum((estimate() - exact).square().sum().item() for _ in range(200))

    assert error(lambda: _weight_gradient(x, grad, 30, generator)) < 0.8 * error(plain)


def test_winners_are_the_largest_rows_with_weight_one(problem: tuple[Tensor, Tensor]) -> None:
    x, _ = problem
    index, weight = sample_rows(x, 40, _generator(3))
    winners = weight == 1
    assert winners.any()
    assert not winners.all()
    largest = x.norm(dim=1).argsort(descending=True)[: int(winners.sum())]
    assert set(index[winners].tolist()) == set(largest.tolist())


def test_what_is_exact(problem: tuple[Tensor, Tensor]) -> None:
    """All rows kept; few rows that are not zero; no row that is not zero."""
    x, grad = problem
    for keep in (96, 1000):
        torch.testing.assert_close(_weight_gradient(x, grad, keep, _generator(0)), grad.t() @ x)
    few = torch.zeros_like(x)
    few[[3, 17, 41]] = x[:3]
    for sparse in (few, torch.zeros_like(x)):
        torch.testing.assert_close(_weight_gradient(sparse, grad, 5, _generator(0)), grad.t() @ sparse)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_rows_without_a_finite_norm_stay_visible(problem: tuple[Tensor, Tensor], value: float) -> None:
    x, grad = problem
    x[[4, 7], 1] = value  # 1e30 squared is too large for fp32
    assert _weight_gradient(x, grad, 5, _generator(0)).isnan().any()


def test_the_codec_has_the_input_as_its_mean(problem: tuple[Tensor, Tensor]) -> None:
    x = problem[0].view(4, 24, 6)
    codec = ColumnRowSampling(get_codec("exact"), keep=0.3, seed=4)
    draws = torch.stack([codec.decode(codec.encode(x)) for _ in range(2000)]).double()
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - x).abs() <= 5 * deviation + 1e-5).all()
    # 29 rows of 96 are kept, or fewer where one was drawn twice.
    assert (draws[0].abs().sum(-1) > 0).sum() <= 29


def test_rows_may_be_stored_by_another_codec(problem: tuple[Tensor, Tensor]) -> None:
    x = problem[0].repeat(1, 16)
    exact, int8 = (ColumnRowSampling(get_codec(name), keep=0.25) for name in ("exact", "int8"))
    nbytes = get_codec("crs", keep=0.25, rows="int8").nbytes(x.shape, torch.bfloat16)
    assert nbytes == get_codec("int8").nbytes((24, 96), torch.bfloat16) + 24 * 8
    a, b = (codec.decode(codec.encode(x)) for codec in (int8, exact))
    assert (a - b).norm() < 0.02 * b.norm()
