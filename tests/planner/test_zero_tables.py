"""Model-state arithmetic against the published figures and DeepSpeed's own functions."""

import pytest

from slimfit_ds.planner.zero_tables import slimfit_states, zero_states


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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_slimfit_with_everything_active_is_zero(stage):
    full = zero_states(1000, stage, 4)
    slim = slimfit_states(1000, 1000, stage, 4, residency="device")
    assert slim.device == full.device


def test_slimfit_on_host_keeps_active_states_only():
    states = slimfit_states(1000, 50, 1, 1)
    assert states.device == 2 * 1000 + 2 * 50 + 12 * 50
    assert states.host == 12 * 1000
    assert slimfit_states(1000, 50, 1, 1, seen=200).host == 12 * 200


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: zero_states(1, 4, 1), "stage"),
        (lambda: zero_states(1, 1, 0), "ranks"),
        (lambda: zero_states(1, 1, 1, "int8"), "dtype"),
        (lambda: slimfit_states(10, 11, 1, 1), "active"),
        (lambda: slimfit_states(10, 1, 1, 1, residency="disk"), "residency"),
    ],
)
def test_errors_name_the_value(call, word):
    with pytest.raises(ValueError, match=word):
        call()
