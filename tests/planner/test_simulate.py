"""Estimates on fake tensors against tracked steps on real ones, and against element counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slimfit_ds.planner.simulate import Simulator, estimate
from slimfit_ds.planner.strategies import Strategy, get_strategy
from slimfit_ds.planner.workload import Workload

BERT = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 2000,
}
# Wide enough that the scratch of the codecs on a CPU (2^18 elements at a time; fused kernels have none, and the fake
# run follows those) is small beside the rest.
WIDE = {**BERT, "hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
LLAMA = {**WIDE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2}
VIT = {**WIDE, "model_type": "vit", "image_size": 32, "patch_size": 4}

# Every kind of strategy once; benchmarks/memory/estimate_vs_measured.py has every pair at full size.
CASES = {
    "bert": (WIDE, ["zero0", "gradient_checkpointing", "lora", "balanced", "minimal_ils"]),
    "llama": (LLAMA, ["zero2", "minimal", "balanced_ils"]),
    "vit": (VIT, ["balanced"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_estimates_are_those_of_a_measurement(case, fake, real):
    config, names = CASES[case]
    workload = Workload(config, batch=8, seq=32)
    for name in names:
        guess = fake.run(workload, get_strategy(name), target="cpu")
        truth = real.run(workload, get_strategy(name))
        assert (guess.error, truth.error) == ("", "")
        assert guess.peak == pytest.approx(truth.peak, rel=0.02), name
        assert guess.report.parameters == truth.report.parameters
        assert guess.report.optimizer == truth.report.optimizer > 0
        assert guess.active == truth.active


@pytest.mark.slow
def test_a_front_does_not_lower_the_peak(fake):
    """The second step, which is tracked, would end in the middle; the largest one does not."""
    whole = get_strategy("minimal")
    freeze = (whole.slimfit or {}).get("freeze", {})
    half = replace(whole, slimfit={**(whole.slimfit or {}), "freeze": {**freeze, "front": "half"}})
    peaks = [fake.run(Workload(BERT, batch=4, seq=16), strategy) for strategy in (whole, half)]
    assert [found.error for found in peaks] == ["", ""]
    assert peaks[0].peak == peaks[1].peak > 0


@pytest.mark.slow
def test_states_divide_over_ranks_and_leave_the_device(fake, fake_of_four):
    workload = Workload(BERT, batch=3, seq=8)
    ils = get_strategy("minimal_ils")
    strategies = {
        "zero1": get_strategy("zero1"),
        "offload": get_strategy("zero2_offload"),
        "host": ils,
        "device": ils.with_(slimfit={**ils.slimfit, "optimizer_states": {"inactive": "device"}}),
    }
    for ranks, simulator in ((1, fake), (4, fake_of_four)):
        rows = {name: simulator.run(workload, strategy) for name, strategy in strategies.items()}
        assert [row.error for row in rows.values()] == [""] * 4
        reports = {name: row.report for name, row in rows.items()}
        parameters = rows["zero1"].parameters
        assert reports["zero1"].optimizer == pytest.approx(12 * parameters / ranks, rel=0.02)
        assert reports["offload"].optimizer == 0
        assert reports["offload"].optimizer_host >= 12 * parameters / ranks
        # Device residency: every layer has trained once before long; biases and norms always train.
        assert reports["device"].optimizer == pytest.approx(12 * parameters / ranks, rel=0.02)
        assert reports["host"].optimizer < 0.35 * reports["device"].optimizer
    zero3 = fake_of_four.run(workload, get_strategy("zero3"))
    assert zero3.report.optimizer == pytest.approx(12 * zero3.parameters / 4, rel=0.1)
    bad = fake.run(workload, get_strategy("full").with_(accumulation=2))
    assert "does not divide" in bad.error
    with pytest.raises(ValueError, match="does not divide"):
        _ = bad.peak


@pytest.mark.slow
def test_cuda_keeps_no_probabilities_where_the_cpu_does(fake):
    """With dropout in the attention the CPU falls back to kept probabilities [batch, heads, seq, seq]."""
    workload = Workload({**BERT, "max_position_embeddings": 512}, batch=2, seq=512)
    cuda = fake.run(workload, get_strategy("full"), target="cuda")
    cpu = fake.run(workload, get_strategy("full"), target="cpu")
    probabilities = 2 * 2 * 512 * 512 * 2 * 2  # batch, heads, bytes, layers
    assert cpu.report.saved_activations - cuda.report.saved_activations > probabilities


@pytest.mark.slow
def test_an_offloaded_optimizer_takes_its_gradients_along(fake):
    config = {"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    workload = Workload({**config, "intermediate_size": 1024, "vocab_size": 30000}, batch=1, seq=8)
    row = fake.run(workload, Strategy("on", stage=2, offload=True, dtype="bf16"), target="cpu")
    # bf16 weights; the largest gradient in bf16, and in float64 for its norm; not fp32 gradients of all weights.
    assert row.peak < 2 * row.parameters + 11 * 30000 * 256
    assert row.report.optimizer_host >= 16 * row.parameters


def test_wrong_arguments():
    workload = Workload(BERT)
    with pytest.raises(ValueError, match="target"):
        estimate(workload, ["full"], target="tpu")
    with pytest.raises(ValueError, match="did you mean 'minimal'"):
        estimate(workload, ["minimall"])
    with pytest.raises(ValueError, match="world_size"):
        Simulator(0)
    with pytest.raises(ValueError, match="one rank"):
        Simulator(2, real=True)
