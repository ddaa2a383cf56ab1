"""The linear function of ZeRO 3: torch's numbers, and nothing saved that backward does not use."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import slimfit_ds
from slimfit_ds.engine import zero3_linear

PLAIN = torch._C._nn.linear


def cut(tensor: torch.Tensor) -> Any:
    """A parameter that looks like one that ZeRO 3 has cut, and is gathered now."""
    parameter: Any = nn.Parameter(tensor)
    parameter.ds_id = 0
    return parameter


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 1, 3, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_torch(shape, with_bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=dtype, generator=generator).requires_grad_()
    weight = cut(torch.randn(4, 5, dtype=dtype, generator=generator))
    bias = cut(torch.randn(4, dtype=dtype, generator=generator)) if with_bias else None
    inputs: list[Any] = [x, weight, *([bias] if with_bias else [])]
    mine, theirs = zero3_linear.linear(x, weight, bias), PLAIN(x, weight, bias)
    assert torch.equal(mine, theirs)
    gradient = torch.randn(theirs.shape, dtype=dtype, generator=generator)
    for a, b in zip(
        torch.autograd.grad(mine, inputs, gradient),
        torch.autograd.grad(theirs, inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("input_trains", "weight_trains", "bias_trains"), list(itertools.product([True, False], repeat=3))
)
def test_only_what_backward_uses_is_saved(input_trains, weight_trains, bias_trains):
    x = torch.randn(3, 5, requires_grad=input_trains)
    weight, bias = cut(torch.randn(4, 5)), cut(torch.randn(4))
    weight.requires_grad_(weight_trains)
    bias.requires_grad_(bias_trains)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = zero3_linear.linear(x, weight, bias)
    # The parameter itself, never a view: its gathered data must not be kept alive.
    expected = [weight] if input_trains else []
    expected += [x] if weight_trains else []
    assert {id(tensor) for tensor in saved} == {id(tensor) for tensor in expected}
    if output.requires_grad:
        output.sum().backward()
    for tensor, trains in ((x, input_trains), (weight, weight_trains), (bias, bias_trains)):
        assert (tensor.grad is not None) == trains


def test_autocast_works_as_with_torch():
    x = torch.randn(3, 5, requires_grad=True)
    weight, bias = cut(torch.randn(4, 5)), cut(torch.randn(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = zero3_linear.linear(x, weight, bias), PLAIN(x, weight, bias)
    assert mine.dtype is torch.bfloat16
    assert torch.equal(mine, theirs)
    gradient = torch.randn_like(mine)
    for a, b in zip(
        torch.autograd.grad(mine, (x, weight, bias), gradient),
        torch.autograd.grad(theirs, (x, weight, bias), gradient),
        strict=True,
    ):
        assert a.dtype is torch.float32
        torch.testing.assert_close(a, b)


def test_weights_that_are_not_cut_go_to_torch():
    x, weight = torch.randn(3, 5), nn.Parameter(torch.randn(4, 5))
    assert "AddmmBackward" in type(zero3_linear.linear(x, weight, torch.zeros(4)).grad_fn).__name__
    vector = cut(torch.randn(5))
    assert torch.equal(zero3_linear.linear(x, vector), PLAIN(x, vector))


def test_a_weight_that_was_released_is_gathered_for_its_backward():
    class Status:
        name = "AVAILABLE"

    x = torch.randn(3, 5, requires_grad=True)
    weight = cut(torch.randn(4, 5))
    whole, weight.ds_status = weight.data.clone(), Status()
    calls: list[str] = []

    def all_gather() -> None:
        calls.append("gather")
        weight.data = whole

    def partition() -> None:
        calls.append("partition")
        weight.data = torch.empty(0)

    weight.all_gather, weight.partition = all_gather, partition
    weight.requires_grad_(False)
    output = zero3_linear.linear(x, weight)
    weight.data, weight.ds_status.name = torch.empty(0), "NOT_AVAILABLE"
    output.sum().backward()
    assert calls == ["gather", "partition"]
    torch.testing.assert_close(x.grad, whole.sum(0).expand(3, 5))


def test_what_deepspeed_replaced_is_put_back_and_ours_is_there_in_between(monkeypatch):
    monkeypatch.setattr(functional, "linear", PLAIN)
    scope = zero3_linear.ScopedLinear()
    with scope.kept():
        # As DeepSpeed does while an engine is built.
        functional.linear = zero3_linear_wrap
    assert functional.linear is PLAIN
    other = zero3_linear.ScopedLinear()
    with scope:
        assert functional.linear is zero3_linear.linear
        with other:
            assert functional.linear is zero3_linear.linear
        assert functional.linear is zero3_linear.linear
    assert functional.linear is PLAIN
    with scope.kept():
        pass
    # DeepSpeed replaced nothing: `memory_efficient_linear` is false.
    with scope:
        assert functional.linear is PLAIN


def engine_at_stage_3():
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "slimfit": {"freeze": {"policy": "ils", "rate": 0.7}},
    }
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    return slimfit_ds.initialize(model=Recomputing(*blocks), config=config)[0]


class Recomputing(nn.Sequential):
    """Notes which linear function is in force whenever a block runs, the second time in the backward pass."""

    def forward(self, x):
        self.seen = []
        for block in self:
            x = checkpoint(self.block, block, x, use_reentrant=False)
        return x.square().mean()

    def block(self, block, x):
        self.seen.append(functional.linear)
        return block(x)


@pytest.mark.parametrize("direct", [False, True])
def test_an_engine_leaves_torchs_function_as_it_was(one_rank, direct):
    before = functional.linear
    engine = engine_at_stage_3()
    assert functional.linear is before
    for _ in range(2):
        loss = engine(torch.randn(2, 6))
        assert functional.linear is before
        # DeepSpeed allows both ways from stage 1 on.
        loss.backward() if direct else engine.backward(loss)
        assert functional.linear is before
        assert engine.module.seen == [zero3_linear.linear] * 6
        engine.step()
    loss = engine(torch.randn(2, 6))
    loss.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.backward(loss)
    assert functional.linear is before
    engine.destroy()
    assert functional.linear is before
