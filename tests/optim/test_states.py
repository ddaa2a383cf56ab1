from __future__ import annotations

import pytest
import torch

from slimfit_ds.optim import low_bit
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.optim.rules import RULES
from slimfit_ds.optim.states import LayerState, StateStore, UnitStates

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0}


def layout(**config) -> UnitStates:
    return UnitStates(RULES["AdamW"], OptimizerStatesConfig(**config))


@pytest.mark.parametrize(
    ("dtype", "config", "names"),
    [
        (torch.float32, {}, {"exp_avg", "exp_avg_sq"}),
        (torch.bfloat16, {}, {"exp_avg", "exp_avg_sq", "master"}),
        (torch.float16, {}, {"exp_avg", "exp_avg_sq", "master"}),
        (torch.bfloat16, {"bf16_weights": "stochastic_rounding"}, {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_states_by_dtype(dtype, config, names):
    shard = torch.randn(10).to(dtype)
    tensors = layout(**config).create(shard, OPTIONS)
    assert set(tensors) == names
    if "master" in names:
        assert torch.equal(tensors["master"], shard.float())
        assert tensors["master"].dtype is torch.float32


@pytest.mark.parametrize("stale", ["keep", "decay", "reset"])
def test_moments_after_missed_steps(stale):
    states = layout(stale_moments=stale)
    state = LayerState(
        {"exp_avg": torch.full((2,), 3.0), "exp_avg_sq": torch.full((2,), 5.0)}, 4, last_step=10
    )
    states.refresh(state, 14, OPTIONS)
    # Steps 11, 12 and 13 were missed.
    expected = {"keep": (3.0, 5.0, 5), "decay": (3.0 * 0.9**3, 5.0 * 0.99**3, 8), "reset": (0.0, 0.0, 1)}[
        stale
    ]
    torch.testing.assert_close(state.tensors["exp_avg"], torch.full((2,), expected[0]))
    torch.testing.assert_close(state.tensors["exp_avg_sq"], torch.full((2,), expected[1]))
    assert (state.step, state.last_step) == (expected[2], 14)


@pytest.mark.parametrize("stale", ["keep", "decay", "reset"])
def test_consecutive_steps_age_nothing(stale):
    states = layout(stale_moments=stale)
    state = LayerState({"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}, 4, last_step=10)
    states.refresh(state, 11, OPTIONS)
    assert torch.equal(state.tensors["exp_avg"], torch.ones(2))
    assert state.step == 5


def test_eight_bit_moments_take_a_quarter_and_come_back_close():
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    states = layout(precision="8bit")
    values = torch.randn(8000)
    packed = states.packed(LayerState({"exp_avg": values, "exp_avg_sq": values.square()}))
    assert packed.nbytes < 0.27 * 2 * 4 * 8000
    plain = states.plain(packed, 8000)
    # Dynamic 8-bit codes: a relative error of a few per cent for all but the smallest values of a block.
    error = (plain.tensors["exp_avg"] - values).norm() / values.norm()
    assert 0 < error < 0.02
    assert (plain.tensors["exp_avg_sq"] >= 0).all()


def test_small_states_stay_in_float32():
    assert set(layout(precision="8bit").create(torch.randn(100), OPTIONS)) == {"exp_avg", "exp_avg_sq"}


def test_low_bit_padding():
    pytest.importorskip("torchao")
    values = torch.linspace(-1, 1, 300)
    codes, scale = low_bit.quantize(values, signed=True)
    assert codes.numel() == 2 * low_bit.BLOCK
    assert scale.numel() == 2
    assert (low_bit.dequantize(codes, scale, 300, signed=True) - values).abs().max() < 0.02


@pytest.mark.parametrize("inactive", ["device", "host"])
def test_store_keeps_states_where_they_belong(inactive):
    made: list[int] = []

    def create(unit: int) -> dict[str, torch.Tensor]:
        made.append(unit)
        return {"exp_avg": torch.zeros(10)}

    store = StateStore(torch.device("cpu"), inactive == "host", create)
    assert 3 not in store
    store.get(3).tensors["exp_avg"].add_(1)
    store.get(3).step = 7
    store.get(4).tensors["exp_avg"].add_(2)
    assert made == [3, 4]
    assert (store.device_bytes(), store.host_bytes()) == (80, 0)

    store.write_back([3])
    on_host = inactive == "host"
    assert store.device_bytes() == (40 if on_host else 80)
    assert store.host_bytes() == (40 if on_host else 0)
    assert store.peek(3).step == 7

    store.prefetch([3, 5])
    assert store.device_bytes() == 80
    store.get(3).tensors["exp_avg"].add_(10)
    store.write_back([3])
    assert store.units == [3, 4]
    assert torch.equal(store.peek(3).tensors["exp_avg"], torch.full((10,), 11.0))
    assert made == [3, 4]


def test_states_that_first_leave_the_device_are_not_there_twice():
    store = StateStore(torch.device("cpu"), True, lambda unit: {"exp_avg": torch.zeros(10)})
    made = store.get(0).tensors["exp_avg"]
    store.write_back([0])
    assert store.peek(0).tensors["exp_avg"] is made
    # Awake again: a copy for the device, as between two memories.
    store.get(0).tensors["exp_avg"].add_(1)
    assert made.sum() == 0
    store.write_back([0])
    assert made.sum() == 10


def test_put_replaces_a_state():
    store = StateStore(torch.device("cpu"), True, lambda unit: {"exp_avg": torch.zeros(2)})
    store.get(0)
    store.write_back([0])
    store.put(0, LayerState({"exp_avg": torch.ones(2)}, 3, 5))
    assert torch.equal(store.get(0).tensors["exp_avg"], torch.ones(2))
    assert (store.get(0).step, store.get(0).last_step) == (3, 5)
    store.clear()
    assert store.units == []
