"""The relative update: against the paper's formula, by hand at zero, and in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slimfit_ds.schedule import statistics
from slimfit_ds.schedule.statistics import of_units, sum_of_move, sum_of_update, sums_of_moves


def test_it_is_the_papers_formula_for_small_updates():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=1000) + 3 * np.sign(generator.normal(size=1000))
    update = 1e-3 * generator.normal(size=1000)
    paper = np.mean(np.abs(update / weight))
    total = sum_of_update(torch.tensor(update).float(), torch.tensor(weight).float()).item()
    assert of_units({3: total}, {3: 1000})[3] == pytest.approx(paper, rel=1e-5)


def test_it_is_safe_at_zero():
    weight = torch.tensor([0.0, 0.0, 1e-38, 2.0])
    update = torch.tensor([0.0, 5.0, -3.0, 1.0])
    # By hand: 0/0 counts 0, an update beyond its weight counts 1, and 1/2.
    assert sum_of_update(update, weight).item() == pytest.approx(0 + 1 + 1 + 0.5)


@pytest.mark.parametrize("shape", [(0,), (7,), (300, 500)])
def test_a_cache_at_a_time_gives_the_sum_of_the_whole(shape):
    torch.manual_seed(2)
    before = torch.randn(shape)
    after = before + 1e-3 * torch.randn(shape)
    old, change = before.double(), (after.double() - before.double())
    expected = (change.abs() / torch.maximum(change.abs(), old.abs())).sum().float()
    torch.testing.assert_close(sum_of_move(before, after), expected, rtol=1e-4, atol=1e-6)
    update = change.float().flatten()
    torch.testing.assert_close(sum_of_update(update, before.flatten()), expected, rtol=1e-4, atol=1e-6)


def test_a_move_of_bf16_weights_is_measured_in_float32():
    before = torch.tensor([1.0, 2.0, -4.0], dtype=torch.bfloat16)
    after = torch.tensor([1.0078125, 2.0, -4.03125], dtype=torch.bfloat16)
    # 1 / 128 of the first, 1 / 128 of the third, by hand.
    assert sum_of_move(before, after).item() == pytest.approx(2 / 128)


def test_an_active_unit_without_a_sum_did_not_move_and_one_without_a_rate_is_left_out():
    assert of_units({1: 2.0, 2: 1.0}, {1: 4, 5: 10}) == {1: 0.5, 5: 0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_together_as_each_alone(monkeypatch, dtype):
    """What runs on a device, on the CPU."""
    torch.manual_seed(0)
    old = [torch.randn(n, 3).to(dtype) for n in (5, 1, 40, 2, 3)]
    new = [t + 0.1 * torch.randn_like(t) for t in old]
    expected = [sum_of_move(*pair) for pair in zip(old, new, strict=True)]
    monkeypatch.setattr(statistics, "_runs_on_cpu", lambda tensor: False)
    monkeypatch.setattr(statistics, "_DEVICE_PIECE", 30)
    torch.testing.assert_close(sums_of_moves(old, new), expected)
    assert sums_of_moves([], []) == []
