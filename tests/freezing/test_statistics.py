from __future__ import annotations

import numpy as np
import pytest
import torch

from slimfit_ds.freezing.statistics import STATISTICS


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


def test_norms_against_numpy():
    torch.manual_seed(1)
    update, weight = torch.randn(50), torch.randn(50)
    length = np.linalg.norm(update.double().numpy())
    ratio = length / np.linalg.norm(weight.double().numpy())
    assert measure("relative_norm", update, weight) == pytest.approx(ratio, rel=1e-6)
    assert measure("update_norm", update, weight) == pytest.approx(length, rel=1e-6)
    assert measure("relative_norm", update, torch.zeros(50)) == 1.0
    assert measure("relative_norm", torch.zeros(50), torch.zeros(50)) == 0.0
