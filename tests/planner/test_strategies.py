"""The catalogue of strategies; model-state arithmetic against published figures and DeepSpeed's own functions."""

import pytest

from slimfit_ds.activations.config import PRESETS
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.planner.strategies import GRADIENT_ERROR, STRATEGIES, get_strategy, slimfit_block, zero_states


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_figure_1_of_the_zero_paper(stage, gigabytes):
    states = zero_states(7_500_000_000, stage, 64)
    assert states.device / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_deepspeeds_own_estimate_of_stage_3():
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    parameters = 1_000_000_000
    _, device, _ = estimate_zero3_model_states_mem_needs(
        total_params=parameters,
        largest_layer_params=0,
        num_gpus_per_node=8,
        cpu_offload=False,
        cpu_offload_params=False,
    )
    # DeepSpeed counts 18 bytes: 4 for gradients in fp32.
    assert device == pytest.approx(zero_states(parameters, 3, 8).device * 18 / 16, rel=1e-6)


def test_fp32_needs_no_master():
    assert zero_states(100, 0, 1, "fp32").device == 1600
    assert zero_states(100, 0, 1, "fp32").optimizer == 800


def test_offload_moves_the_states():
    states = zero_states(1000, 2, 4, offload=True)
    assert states.optimizer == 0
    assert states.host == (12 + 4) * 1000 / 4


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: zero_states(1, 4, 1), "stage"),
        (lambda: zero_states(1, 1, 0), "ranks"),
        (lambda: zero_states(1, 1, 1, "int8"), "dtype"),
        (lambda: get_strategy("minimall"), "did you mean 'minimal'"),
    ],
)
def test_errors_name_the_value(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_every_preset_is_a_strategy_with_a_known_error():
    assert set(GRADIENT_ERROR) == set(PRESETS)
    for preset in PRESETS:
        plain, host, ils = (STRATEGIES[preset + suffix] for suffix in ("", "_host", "_ils"))
        assert {SlimFitConfig.parse(s.slimfit).activations.preset for s in (plain, host, ils)} == {preset}
        assert SlimFitConfig.parse(host.slimfit).optimizer_states.inactive == "host"
        assert SlimFitConfig.parse(ils.slimfit).freeze.policy == "ils"
        # The recommended setting is what an empty freeze block stands for.
        assert "freeze" not in plain.slimfit
    assert SlimFitConfig.parse(slimfit_block("ultra", 0.8, chunk_tokens=64)).activations.chunk_tokens == 64


def test_every_strategy_is_a_sound_deepspeed_configuration():
    for strategy in STRATEGIES.values():
        config = strategy.deepspeed_config(2, "bf16", 4)
        assert config["train_batch_size"] == 8
        assert config["zero_optimization"]["stage"] == (strategy.stage or 0)
        assert ("slimfit" in config) == (strategy.slimfit is not None)
        if strategy.slimfit is not None:
            SlimFitConfig.parse(config["slimfit"])
    assert "reduce_bucket_size" not in STRATEGIES["zero1_default"].zero_block()
    assert STRATEGIES["zero2_offload"].zero_block()["offload_optimizer"] == {"device": "cpu"}
