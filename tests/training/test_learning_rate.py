"""The learning rate over a run."""

from __future__ import annotations

import math

import pytest

from slimfit_ds.training.learning_rate import rate_factor


def test_linear_without_warm_up_is_that_of_transformers():
    import torch
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = get_linear_schedule_with_warmup(optimizer, 0, 10)
    factor = rate_factor("linear", 10, 0)
    for step in range(10):
        assert factor(step) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_warm_up_grows_by_equal_parts_to_the_peak():
    factor = rate_factor("cosine", 20, 4)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor(12) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (10, 3), (5, 4)])
def test_every_step_learns(name, total, warmup):
    factor = rate_factor(name, total, warmup)
    assert all(0 < factor(step) <= 1 for step in range(total))
