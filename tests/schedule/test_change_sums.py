"""The sums in C and in torch against float64."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from slimfit_ds.schedule import change_sums, statistics
from slimfit_ds.schedule.statistics import STATISTICS

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")

SIZES = (1, 15, 16, 17, 4096, 4099, 65536, 65537, 200_001)


def reference(weight: torch.Tensor, change: torch.Tensor) -> list[float]:
    weight, change = weight.double().flatten(), change.double().flatten()
    top = torch.maximum(weight.abs(), change.abs())
    shares = torch.where(top > 0, change.abs() / top, 0.0)
    return [shares.sum().item(), change.square().sum().item(), weight.square().sum().item()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", SIZES)
def test_a_change_and_a_move(numel, dtype):
    torch.manual_seed(numel)
    weight = torch.randn(numel).to(dtype)
    weight[::7] = 0
    after = (weight.float() + 0.1 * torch.randn(numel)).to(dtype)
    after[::14] = 0
    assert change_sums.runs_in_c(weight, after)
    found = change_sums.change_sums(weight, after, moved=True)
    # Both dtypes are subtracted in float32.
    expected = reference(weight, after.float() - weight.float())
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    change = 0.1 * torch.randn(numel).to(dtype)
    found = change_sums.change_sums(weight, change, moved=False)
    assert found.tolist() == pytest.approx(reference(weight, change), rel=1e-5)


def test_the_number_of_threads_does_not_matter():
    torch.manual_seed(0)
    weight, change = torch.randn(300_000), torch.randn(300_000)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(change_sums.change_sums(weight, change, moved=False))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("spoilt", ["weight", "change"])
def test_what_is_not_finite_shows(spoilt):
    weight, change = torch.ones(100), torch.ones(100)
    (weight if spoilt == "weight" else change)[63] = math.nan
    sums = change_sums.change_sums(weight, change, moved=False)
    assert math.isnan(sums[0])
    assert math.isnan(sums[2 if spoilt == "weight" else 1])


def test_what_the_kernel_does_not_take_runs_in_torch():
    weight = torch.zeros(8)
    assert not change_sums.runs_in_c(weight.double(), weight.double())
    assert not change_sums.runs_in_c(weight, weight.bfloat16())
    assert not change_sums.runs_in_c(weight.view(2, 4).t(), weight.view(2, 4).t())
    assert not change_sums.runs_in_c(weight.to("meta"), weight.to("meta"))


@pytest.mark.parametrize("name", [name for name, statistic in STATISTICS.items() if statistic.sums])
def test_statistics_are_the_same_without_a_compiler(name, monkeypatch):
    torch.manual_seed(3)
    before = torch.randn(300, 500)
    after = before + 1e-3 * torch.randn(300, 500)
    statistic = STATISTICS[name]
    update, weight = (after - before).flatten(), before.flatten()
    in_c = [statistic.of_move(before, after), statistic.of_update(update, weight)]
    monkeypatch.setattr(statistics, "runs_in_c", lambda *_: False)
    in_torch = [statistic.of_move(before, after), statistic.of_update(update, weight)]
    torch.testing.assert_close(in_c, in_torch, rtol=1e-5, atol=0)
