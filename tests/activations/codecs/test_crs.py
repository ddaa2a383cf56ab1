"""Column-row sampling against the full product."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.codecs.crs import SampledRows, sample_rows


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """Input [96, 6] whose rows differ in size by orders of magnitude, and an output gradient [96, 5]."""
    g = _generator(0)
    return torch.randn(96, 6, generator=g) * torch.randn(96, 1, generator=g).exp(), torch.randn(
        96, 5, generator=g
    )


@pytest.mark.parametrize("keep", [1, 30, 95])
@pytest.mark.parametrize("given", [False, True])
def test_the_weight_gradient_is_unbiased(problem: tuple[Tensor, Tensor], keep: int, given: bool) -> None:
    x, grad = problem
    importance = x.norm(dim=1) * grad.norm(dim=1) if given else None
    draws = 1000
    generator = _generator(1)
    estimates = torch.stack(
        [
            sample_rows(x, keep, generator=generator, importance=importance).weight_gradient(grad)
            for _ in range(draws)
        ]
    ).double()
    exact = grad.double().t() @ x.double()
    deviation = estimates.std(0) / math.sqrt(draws)
    assert ((estimates.mean(0) - exact).abs() <= 5 * deviation + 1e-5).all()


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

    assert error(lambda: sample_rows(x, 30, generator=generator).weight_gradient(grad)) < 0.8 * error(plain)


def test_rows_are_copies_of_the_input_and_winners_have_weight_one(problem: tuple[Tensor, Tensor]) -> None:
    x, _ = problem
    sampled = sample_rows(x, 40, generator=_generator(3))
    assert torch.equal(sampled.rows, x[sampled.index.long()])
    winners = sampled.weight == 1
    assert winners.any()
    assert not winners.all()
    norms = x.norm(dim=1)
    largest = norms.argsort(descending=True)[: int(winners.sum())]
    assert set(sampled.index[winners].tolist()) == set(largest.tolist())
    assert sampled.nbytes == 40 * (6 * 4 + 4 + 4)


def test_keeping_all_rows_is_exact(problem: tuple[Tensor, Tensor]) -> None:
    x, grad = problem
    for keep in (96, 1000):
        torch.testing.assert_close(
            sample_rows(x, keep, generator=_generator(0)).weight_gradient(grad), grad.t() @ x
        )


def test_few_nonzero_rows_are_all_kept() -> None:
    x = torch.zeros(50, 4)
    x[[3, 17, 41]] = torch.randn(3, 4)
    grad = torch.randn(50, 2)
    torch.testing.assert_close(sample_rows(x, 5, generator=_generator(0)).weight_gradient(grad), grad.t() @ x)


def test_all_zero_input_gives_a_zero_gradient() -> None:
    estimate = sample_rows(torch.zeros(20, 3), 4, generator=_generator(0)).weight_gradient(torch.randn(20, 2))
    assert torch.equal(estimate, torch.zeros(2, 3))


def test_nan_stays_visible() -> None:
    x = torch.randn(20, 3)
    x[4, 1] = torch.nan
    assert sample_rows(x, 5, generator=_generator(0)).weight_gradient(torch.ones(20, 2)).isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    x, grad = torch.randn(64, 8).to(dtype), torch.randn(64, 4).to(dtype)
    sampled: SampledRows = sample_rows(x, 64 - 1, generator=_generator(0))
    assert sampled.rows.dtype == dtype
    assert sampled.weight_gradient(grad).dtype == dtype


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    sample_rows(torch.randn(20, 3, generator=_generator(1)), 4, generator=_generator(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("x", "keep", "importance", "message"),
    [
        (torch.ones(4), 1, None, r"got shape \(4,\)"),
        (torch.ones(4, 2), 0, None, "got 0"),
        (torch.ones(4, 2), 1, torch.ones(3), r"shape \(4,\), got \(3,\)"),
    ],
)
def test_bad_arguments(x: Tensor, keep: int, importance: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_rows(x, keep, generator=_generator(0), importance=importance)


def test_the_codec_has_the_input_as_its_mean(problem: tuple[Tensor, Tensor]) -> None:
    x, _ = problem
    codec = get_codec("crs", keep=0.3)
    generator = _generator(4)
    draws = torch.stack(
        [codec.decode(codec.encode(x.view(4, 24, 6), generator=generator)) for _ in range(2000)]
    ).double()
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - x.view(4, 24, 6)).abs() <= 5 * deviation + 1e-5).all()
    # 29 rows of 96 are kept, or fewer where one was drawn twice.
    assert (draws[0].abs().sum(-1) > 0).sum() <= 29


def test_the_codec_gives_the_weight_gradient_of_its_rows(problem: tuple[Tensor, Tensor]) -> None:
    x, grad = problem
    kept = get_codec("crs", keep=0.3).encode(x, generator=_generator(5))
    expected = sample_rows(x, 29, generator=_generator(5)).weight_gradient(grad)
    torch.testing.assert_close(grad.t() @ get_codec("crs", keep=0.3).decode(kept), expected)


def test_rows_may_be_stored_by_another_codec(problem: tuple[Tensor, Tensor]) -> None:
    x = problem[0].repeat(1, 16)
    codec = get_codec("crs", keep=0.25, rows="int8")
    assert (
        codec.nbytes(x.shape, torch.bfloat16) == get_codec("int8").nbytes((24, 96), torch.bfloat16) + 24 * 8
    )
    exact = get_codec("crs", keep=0.25)
    a, b = (c.decode(c.encode(x, generator=_generator(6))) for c in (codec, exact))
    assert (a - b).norm() < 0.02 * b.norm()


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_keep_is_checked(keep: float) -> None:
    with pytest.raises(ValueError, match=rf"keep must be in \(0, 1\], got {keep}"):
        get_codec("crs", keep=keep)
