from __future__ import annotations

import numpy as np
import pytest
import torch

from slimfit_ds.schedule.statistics import STATISTICS


def measure(name: str, update: torch.Tensor, weight: torch.Tensor, cut: int | None = None) -> float:
    """The statistic over one piece, or over two pieces whose sums are added."""
    statistic = STATISTICS[name]
    parts = [slice(None)] if cut is None else [slice(None, cut), slice(cut, None)]
    sums = sum(statistic.partial(update[part], weight[part]) for part in parts)
    return statistic.finish(sums.tolist(), update.numel())


def test_relative_update_is_the_papers_formula_for_small_updates():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=1000) + 3 * np.sign(generator.normal(size=1000))
    update = 1e-3 * generator.normal(size=1000)
    paper = np.mean(np.abs(update / weight))
    got = measure("relative_update", torch.tensor(update).float(), torch.tensor(weight).float())
    assert got == pytest.approx(paper, rel=1e-5)


def test_relative_update_is_safe_at_zero():
    weight = torch.tensor([0.0, 0.0, 1e-38, 2.0])
    update = torch.tensor([0.0, 5.0, -3.0, 1.0])
    # By hand: 0/0 counts 0, an update beyond its weight counts 1, and 1/2.
    assert measure("relative_update", update, weight) == pytest.approx((0 + 1 + 1 + 0.5) / 4)


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_pieces_add_up(name):
    torch.manual_seed(0)
    update, weight = torch.randn(101), torch.randn(101)
    assert measure(name, update, weight, cut=37) == pytest.approx(measure(name, update, weight), rel=1e-5)


@pytest.mark.parametrize("name", sorted(STATISTICS))
@pytest.mark.parametrize("shape", [(0,), (7,), (300, 500)])
def test_a_cache_at_a_time_gives_the_sums_of_the_whole(name, shape):
    torch.manual_seed(2)
    before = torch.randn(shape)
    after = before + 1e-3 * torch.randn(shape)
    statistic = STATISTICS[name]
    old, update = before.double().flatten(), after.double().flatten() - before.double().flatten()
    expected = statistic.partial(update, old).float()
    torch.testing.assert_close(statistic.of_move(before, after), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        statistic.of_update(update.float(), old.float()), expected, rtol=1e-4, atol=1e-6
    )


def test_a_move_of_bf16_weights_is_measured_in_float32():
    before = torch.tensor([1.0, 2.0, -4.0], dtype=torch.bfloat16)
    after = torch.tensor([1.0078125, 2.0, -4.03125], dtype=torch.bfloat16)
    # 1 / 128 of the first, 1 / 128 of the third, by hand.
    assert STATISTICS["relative_update"].of_move(before, after).item() == pytest.approx(2 / 128)
