"""Estimates on fake tensors against tracked steps on real ones, and against element counts."""

import pytest

from slimfit_ds.planner.estimator import Simulator, estimate
from slimfit_ds.planner.strategy import Strategy, get_strategy, slimfit_block
from slimfit_ds.planner.workload import Workload

BERT = {
    "model_type": "bert",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 2000,
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 2000,
}
VIT = {**BERT, "model_type": "vit", "image_size": 32, "patch_size": 8}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_embd": 128, "n_head": 2}
GPT2 |= {"vocab_size": 2000, "bos_token_id": 1, "eos_token_id": 1}

# Wide enough that the scratch of the codecs on a CPU (2^18 elements at a time; fused kernels have none, and the fake
# run follows those) is small beside the rest.
WIDE = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}

# All strategies on one architecture, those that differ between architectures on the others; the benchmark
# benchmarks/estimate_vs_measured.py has every pair at full size.
CASES = {
    "bert": (
        {**BERT, **WIDE},
        ["zero0", "zero2", "gradient_checkpointing", "lora", "balanced", "lean", "minimal"],
    ),
    "llama": ({**LLAMA, **WIDE}, ["zero2", "balanced", "minimal"]),
    "vit": ({**VIT, **WIDE, "patch_size": 4}, ["balanced", "minimal"]),
    "gpt2": ({**GPT2, "n_embd": 384, "n_head": 6}, ["balanced", "minimal"]),
}


@pytest.fixture(scope="module")
def fake():
    with Simulator() as simulator:
        yield simulator


@pytest.fixture(scope="module")
def real():
    with Simulator(real=True) as simulator:
        yield simulator


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_estimates_are_within_5_percent_of_measurement(case, fake, real):
    config, names = CASES[case]
    workload = Workload(config, batch=32, seq=64)
    for name in names:
        guess = fake.run(workload, get_strategy(name), target="cpu")
        truth = real.run(workload, get_strategy(name))
        assert (guess.error, truth.error) == ("", "")
        assert guess.peak == pytest.approx(truth.peak, rel=0.05), name
        assert guess.report.parameters == truth.report.parameters
        assert guess.active == truth.active
        if guess.strategy.slimfit is not None:
            assert guess.report.optimizer > 0


@pytest.mark.slow
def test_states_divide_over_ranks_and_leave_the_device():
    workload = Workload(BERT, batch=1, seq=8)
    minimal = get_strategy("minimal")
    on_device = minimal.with_(slimfit=slimfit_block("minimal", 0.9, "device"))
    parameters = None
    for ranks in (1, 4):
        zero1, offload, host, device = estimate(
            workload,
            ["zero1", "zero2_offload", minimal.with_(slimfit=slimfit_block("minimal", 0.9)), on_device],
            ranks,
        )
        assert [row.error for row in (zero1, offload, host, device)] == [""] * 4
        parameters = zero1.parameters
        assert zero1.report.optimizer == pytest.approx(12 * parameters / ranks, rel=0.02)
        assert offload.report.optimizer == 0
        assert offload.report.optimizer_host >= 12 * parameters / ranks
        # Device residency: every layer has trained once before long; biases and norms always train.
        assert device.report.optimizer == pytest.approx(12 * parameters / ranks, rel=0.02)
        assert host.report.optimizer < 0.35 * device.report.optimizer


@pytest.mark.slow
def test_world_of_many_ranks_and_failures_are_rows():
    workload = Workload(BERT, batch=3, seq=8)
    zero3, bad = estimate(workload, ["zero3", get_strategy("full").with_(accumulation=2)], world_size=64)
    # The master of the own share, and a share of the weights, dominate at 64 ranks.
    assert zero3.report.optimizer == pytest.approx(12 * zero3.parameters / 64, rel=0.1)
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


def test_wrong_arguments():
    workload = Workload(BERT)
    with pytest.raises(ValueError, match="target"):
        estimate(workload, ["full"], target="tpu")
    with pytest.raises(ValueError, match="did you mean 'minimal'"):
        estimate(workload, ["minimall"])
    with pytest.raises(ValueError, match="world_size"):
        estimate(workload, ["full"], world_size=0)


def test_an_offloaded_optimizer_takes_its_gradients_along():
    config = {"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    workload = Workload({**config, "intermediate_size": 1024, "vocab_size": 30000}, batch=1, seq=8)
    strategies = [Strategy("on", stage=2, offload=True, dtype="bf16")]
    (row,) = estimate(workload, strategies, target="cpu")
    # bf16 weights; the largest gradient in bf16, and in float64 for its norm; not fp32 gradients of all weights.
    assert row.peak < 2 * row.parameters + 11 * 30000 * 256
    assert row.report.optimizer_host >= 16 * row.parameters
