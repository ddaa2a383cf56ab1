"""When a run stops over a loss or a gradient that is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from slimfit_ds.training.best import Best
from slimfit_ds.training.endings import NotFiniteError
from slimfit_ds.training.not_finite import NotFinitePolicy, check_weights
from slimfit_ds.training.recipe import read_recipe

NAN, INF = math.nan, math.inf


def policy(*overrides):
    return NotFinitePolicy(
        read_recipe(None, ["task=causal_lm", "model=gpt2", "max_steps=5", *overrides]).recipe
    )


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (-INF, None), (1.0, NAN), (1.0, INF)])
def test_stop(loss, norm):
    with pytest.raises(NotFiniteError, match=r"step 7.*on_nonfinite=skip"):
        policy().judge(7, loss, norm)


@pytest.mark.parametrize(("loss", "norm"), [(1.0, 2.0), (1.0, None), (0.0, 0.0)])
def test_good_steps_pass(loss, norm):
    policy().judge(0, loss, norm)


def test_fp16_finds_its_loss_scale_by_gradients_that_overflow():
    policy("dtype=fp16").judge(0, 1.0, INF)
    with pytest.raises(NotFiniteError):
        policy("dtype=fp16").judge(0, NAN, INF)


def test_only_skips_in_a_row_count():
    skip = policy("on_nonfinite=skip", "max_nonfinite=2")
    for loss in (NAN, NAN, 1.0, NAN, NAN):
        skip.judge(0, loss, 1.0)
    with pytest.raises(NotFiniteError, match="more than max_nonfinite=2 steps in a row"):
        skip.judge(0, NAN, 1.0)


def test_a_best_value_is_a_number():
    best = Best("loss", lower=True)
    assert not best.offer({"loss": NAN}, 1)
    assert best.offer({"loss": 2.0}, 2)
    assert not best.offer({"loss": NAN}, 3)
    assert best.offer({"loss": 1.0}, 4)


@pytest.mark.usefixtures("one_rank")
def test_weights_that_are_not_finite_are_not_saved():
    module = torch.nn.Linear(3, 2)
    check_weights(module, 4, torch.device("cpu"))
    with torch.no_grad():
        module.bias[1] = NAN
    with pytest.raises(NotFiniteError, match="step 3: a weight is NaN or infinite"):
        check_weights(module, 4, torch.device("cpu"))
