from __future__ import annotations

import torch

from slimfit_ds.optim.low_bit import stochastic_round_bf16


def test_result_is_a_neighbour_and_right_on_average():
    torch.manual_seed(0)
    values = torch.randn(64)
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([stochastic_round_bf16(values, generator).float() for _ in range(4000)])
    # A bfloat16 has 8 bits of mantissa: neighbours are at most 2^-7 of the magnitude apart.
    gap = values.abs() * 2**-7
    assert ((draws - values).abs() <= gap).all()
    # The mean of n draws with spread gap / 2 is off by a few gap / (2 sqrt(n)).
    assert ((draws.mean(0) - values).abs() <= 5 * gap / (2 * 4000**0.5)).all()


def test_exact_numbers_stay():
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), 2.0**-130])
    assert torch.equal(stochastic_round_bf16(values).float(), values)
    assert stochastic_round_bf16(torch.tensor([float("nan")])).isnan().all()
