"""Assumed speed: counted products against closed forms, and bytes over the link."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from slimfit_ds.memory.tracker import MemoryReport
from slimfit_ds.planner.fake_world import CudaSemantics
from slimfit_ds.planner.rivals import nf4_bytes, rivals_by_arithmetic
from slimfit_ds.planner.simulate import estimate
from slimfit_ds.planner.speed import CARDS, ProductCounter, card_for, card_here, card_named, speed
from slimfit_ds.planner.strategies import Strategy
from slimfit_ds.planner.workload import Workload

CARD = CARDS["A100"].with_(flops=100e12, link=25e9, efficiency=1.0, link_efficiency=1.0)


def test_products_of_a_linear_layer_forward_and_backward():
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    with ProductCounter() as counter:
        F.linear(x, weight).sum().backward()
    assert counter.flops == 3 * 2 * 6 * 8 * 4


def test_products_of_attention_that_stands_for_a_kernel():
    """Two products forward and five backward, of the lower half where it is causal."""
    found = {}
    for causal in (False, True):
        with FakeTensorMode(), CudaSemantics():
            q, k, v = (torch.empty(2, 4, n, 16, requires_grad=True) for n in (32, 64, 64))
            with ProductCounter() as counter:
                F.scaled_dot_product_attention(q, k, v, is_causal=causal).sum().backward()
        found[causal] = counter.flops
    whole = 7 * 2 * 2 * 4 * 32 * 64 * 16
    assert found == {False: whole, True: whole // 2}


def test_the_slower_of_the_two_decides():
    """The arithmetic of the design: 8 billion weights, read twice, are hidden from about 2,500 tokens on."""

    def at(tokens: int):
        return speed(6 * 8e9 * tokens, 2 * 2 * 8e9, tokens, CARD)

    assert at(2000).bound == "link"
    assert at(3000).bound == "compute"
    assert at(2000).tokens_per_second == pytest.approx(2000 / 1.28)
    assert str(at(3000)) == "about 2,083 tokens/s, bound by compute"
    with pytest.raises(ValueError, match="no speed"):
        speed(0, 1, 1, CARD)
    with pytest.raises(ValueError, match=r"efficiency must be in \(0, 1\], got 2"):
        speed(1, 1, 1, CARD.with_(efficiency=2))


def test_cards():
    assert [card_for(size * 1e9).name for size in (8, 24, 40, 80, 100, 500)] == [
        *["RTX 4090"] * 2, "A100 40GB", "A100 80GB", *["H200 SXM"] * 2
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "card"),
    [
        *[
            ("4090", "RTX 4090"),
            ("h100", "H100 SXM"),
            ("NVIDIA H100 80GB HBM3", "H100 SXM"),
            ("a100-40", "A100 40GB"),
        ],
        *[
            ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
            ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
            ("NVIDIA L4", "L4"),
        ],
        *[
            ("NVIDIA GeForce RTX 4090", "RTX 4090"),
            ("NVIDIA L40S", "L40S"),
            ("Tesla T4", None),
            ("h10", None),
        ],
    ],
)
def test_a_card_is_known_by_its_name(name, card):
    found = card_named(name)
    assert (None if found is None else found.name) == card


def test_the_gpu_that_is_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert card_here() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, flops in (("NVIDIA L4", 121e12), ("Tesla T4", CARDS["H200"].flops)):
        properties = type("Properties", (), {"name": name, "total_memory": 22 * 2**30})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        here = card_here()
        assert (here.memory, here.flops) == (22 * 2**30, flops)


def test_a_streamed_step_copies_blocks_twice_and_states_once():
    """Counted in the simulation against what is known: blocks, the output layer once, and float32 master and moments."""
    model = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1024,
        "hidden_size": 128,
    }
    model |= {"intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    block = {
        "freeze": {"rate": 0.9},
        "activations": {"preset": "minimal", "chunk_loss_tokens": 32},
        "frozen_weights": {"live": "host"},
        "optimizer_states": {"active": "host"},
    }
    away, here = estimate(
        Workload(model, 2, 32),
        [
            Strategy("away", 0, slimfit=block),
            Strategy("here", 0, slimfit={**block, "frozen_weights": {}, "optimizer_states": {}}),
        ],
    )
    assert away.report is not None, away.error
    weights = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    assert (away.blocks, away.block) == (6, weights)
    states = away.report.optimizer_host
    # Of a step's first two blocks the buffers still hold what the backward pass before has left.
    assert away.copied - states == (2 * 6 - 2) * weights + 2 * 1024 * 128
    assert here.copied == here.blocks == 0
    assert away.flops == here.flops
    # Forward, again, and towards the input, of the output layer not again: two for each weight and token; more for the
    # trained columns and attention.
    linear = 64 * (6 * 6 * weights // 2 + 4 * 1024 * 128)
    assert linear <= away.flops <= 1.2 * linear


def test_rivals_stand_on_a_simulated_step():
    facts = {"parameters": 1000, "linear": 640, "in_blocks": 800, "largest_linear": 64, "largest_block": 100}
    report = MemoryReport(peak=3000, at_peak={"parameters": 2000, "working": 900, "optimizer": 100})
    assert nf4_bytes(64 * 256) == 8192 + 256 + 4
    rows = rivals_by_arithmetic(facts, report, "bf16")
    assert [(row.needs, row.host, row.bound, row.copied) for row in rows] == [
        (int(3000 - 1280 + nf4_bytes(640) + 128), 0, False, 0),
        (3000 - 1600 + 400, 1600, False, 3200),
        (900 + 600, 18_000, True, 0),
        (900 + 600, 16_000, True, 0),
    ]
    assert rivals_by_arithmetic(facts, report, "fp32") == []
