"""Single parameters through `deepspeed.utils.safe_*`: gradients that a script edits, and what is refused. Values on two ranks
are those of the reference: test_stage_matrix."""

from __future__ import annotations

import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
    safe_set_local_grad,
    safe_update_full_grad_vectorized,
)
from torch import nn

import slimfit_ds
from slimfit_ds.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_rank")


def engine_of(stage: int, freeze: dict, **more):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "slimfit": {"freeze": freeze},
        **more,
    }
    return slimfit_ds.initialize(model=model, config=config)[0]


def backward(engine) -> None:
    engine.backward(engine(torch.ones(4, 6)).square().sum())


def test_gradient_partitions_of_zero_3_by_group_and_position():
    engine = engine_of(3, {"policy": "none"})
    assert engine.optimizer.get_fp32_grad_partitions() == {0: {}}
    backward(engine)
    found = engine.optimizer.get_fp32_grad_partitions()
    for place, parameter in enumerate(engine.module.parameters()):
        torch.testing.assert_close(found[0][place], safe_get_full_grad(parameter).flatten())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_edited_gradient_is_the_one_that_steps(stage):
    engine = engine_of(stage, {"policy": "none"}, gradient_clipping=1.0)
    first, second = (p for n, p in engine.module.named_parameters() if n.endswith("weight"))
    before = [safe_get_full_fp32_param(p).clone() for p in (first, second)]
    backward(engine)
    plain = [safe_get_full_grad(p).clone() for p in (first, second)]
    for parameter in engine.module.parameters():
        safe_set_full_grad(parameter, torch.zeros(safe_get_full_grad(parameter).shape))
    safe_update_full_grad_vectorized([first, second], lambda gradient, parameter: gradient + 3.0)
    if stage == 3:
        # DeepSpeed knows local stretches at stage 3 only.
        safe_set_local_grad(second, safe_get_local_grad(second) - 3.0)
    else:
        safe_set_full_grad(second, torch.zeros_like(plain[1]))
    engine.step()
    # The norm of what steps is that of the edited gradients: 48 elements of 3.
    assert engine.get_global_grad_norm() == pytest.approx(3.0 * 48**0.5)
    assert all(gradient.abs().max() > 0 for gradient in plain)
    torch.testing.assert_close(safe_get_full_fp32_param(first), before[0] - 0.5 / 48**0.5)
    assert torch.equal(safe_get_full_fp32_param(second), before[1])


@pytest.mark.parametrize("stage", [1, 3])
def test_what_has_no_effect_is_refused(stage):
    engine = engine_of(stage, {"policy": "ils", "rate": 0.5})
    names = dict(engine.module.named_parameters())
    active = names[next(iter(engine.active_layers))]
    frozen = next(names[n] for n in engine.layer_names if n not in engine.active_layers)
    with pytest.raises(ValueError, match="after the last backward"):
        safe_get_full_grad(active)
    backward(engine)
    assert safe_get_full_grad(frozen) is None
    with pytest.raises(ValueError, match="frozen in this step"):
        safe_set_full_grad(frozen, torch.zeros(safe_get_full_fp32_param(frozen).shape))
    with pytest.raises(ValueError, match="elements, got 3"):
        safe_set_full_grad(active, torch.zeros(3))
    with pytest.raises(KeyError, match="no state of this optimizer, which has none"):
        safe_get_full_optimizer_state(active, "exp_avg")
    with pytest.raises(KeyError, match="no state"):
        safe_set_full_optimizer_state(active, torch.zeros(8, 6), "momentum")


def test_columns_are_parameters_and_the_rest_of_a_layer_has_no_state():
    engine = engine_of(1, {"rate": 0.5, "always_active": []})
    parameters = dict(engine.module.named_parameters())
    assert safe_get_full_fp32_param(parameters["0.weight"]) is None
    columns = parameters["0.weight_columns"]
    safe_set_full_fp32_param(columns, torch.full(columns.shape, 2.0))
    assert (engine.module[0].weight_columns == 2.0).all()
    assert (safe_get_full_fp32_param(columns) == 2.0).all()


def test_masters_follow_weights_that_somebody_else_has_changed(tmp_path):
    engine = engine_of(1, {"policy": "none"}, bf16={"enabled": True})
    start = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.save_checkpoint(tmp_path)
    engine.backward(engine(torch.ones(4, 6, dtype=torch.bfloat16)).square().sum())
    engine.step()
    assert not torch.equal(start["0.weight"], engine.module[0].weight)
    engine.load_checkpoint(tmp_path, load_module_only=True)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(safe_get_full_fp32_param(parameter), start[name].float())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_model_of_vectors_only(stage):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x * self.factor + self.shift

    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": {"stage": stage},
    }
    for block in ({}, {"freeze": {"policy": "ils"}}):
        with pytest.raises(ConfigError, match=r"only vectors \(factor, shift\).*set policy to none"):
            slimfit_ds.initialize(model=Scale(), config={**config, "slimfit": block})
    engine = slimfit_ds.initialize(
        model=Scale(), config={**config, "slimfit": {"freeze": {"policy": "none"}}}
    )[0]
    engine.backward(engine(torch.ones(4, 4)).square().sum())
    engine.step()
    factor, shift = engine.module.parameters()
    # d(sum over four rows of factor^2) = 8.
    assert safe_get_full_fp32_param(factor).tolist() == pytest.approx([0.2] * 4)
    assert safe_get_full_fp32_param(shift).tolist() == pytest.approx([-0.8] * 4)


@pytest.mark.parametrize("ignored", [True, False])
def test_parameters_that_the_loss_does_not_use(ignored):
    engine = engine_of(1, {"policy": "none"}, gradient_accumulation_steps=2)
    engine.optimizer._must_use_all = not ignored
    first = engine.module[0]
    engine.backward(engine(torch.ones(4, 6)).square().sum())
    engine.step()
    # Used in one micro-batch of a step is used.
    engine.backward(first(torch.ones(4, 6)).square().sum())
    engine.step()
    for _ in range(2):
        if ignored or engine.is_gradient_accumulation_boundary() is False:
            engine.backward(first(torch.ones(4, 6)).square().sum())
        else:
            with pytest.raises(AssertionError, match=r"not used in producing loss: 2.weight, 2.bias"):
                engine.backward(first(torch.ones(4, 6)).square().sum())
            return
        engine.step()
    assert ignored


def test_the_setting_of_unused_parameters_arrives():
    for stage, expected in ((0, False), (1, True), (2, True)):
        config = {"zero_optimization": {"stage": stage, "ignore_unused_parameters": False}}
        assert engine_of(stage, {"policy": "none"}, **config).optimizer._must_use_all is expected
