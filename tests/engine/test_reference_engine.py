"""A reference model that is the engine's own policy: as good as a copy of the model that training started from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import slimfit_ds
from slimfit_ds.deltas.reference import ReferenceModel
from slimfit_ds.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_rank")

IDS = torch.arange(24).view(2, 12) % 31


def policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )


def engine_of(model: Any, stage: int, kind: str, bf16: bool) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        "slimfit": {"freeze": {"policy": kind, "rate": 0.7}, "activations": "balanced"},
    }
    return slimfit_ds.initialize(model=model, config=config)[0]


def likelihoods(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits.float()[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))


def preferred(engine: Any, reference: Any, steps: range) -> list[float]:
    """Losses of DPO: the first row is preferred to the second."""
    losses = []
    for step in steps:
        ids = (IDS * (step + 1) + step) % 31
        with torch.no_grad():
            expected = likelihoods(reference, ids)
        margins = likelihoods(engine, ids) - expected
        loss = -torch.nn.functional.logsigmoid(0.1 * (margins[0] - margins[1]))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("stage", "kind", "bf16"),
    [(0, "static", False), (1, "static", True), (2, "static", False), (2, "ils", False)],
)
def test_losses_are_those_with_a_copy_of_the_model(tmp_path, stage, kind, bf16):
    model = policy()
    explicit = copy.deepcopy(model).to(torch.bfloat16 if bf16 else torch.float32).eval()
    expected = preferred(engine_of(model, stage, kind, bf16), explicit, range(6))
    model = policy()
    shared = ReferenceModel(model)
    engine = engine_of(model, stage, kind, bf16)
    found = preferred(engine, shared, range(3))
    engine.save_checkpoint(tmp_path)
    found += preferred(engine, shared, range(3, 6))
    # In bf16 the copy, which is not split, rounds elsewhere.
    tolerance = 2e-4 if bf16 else 0.0
    assert found == pytest.approx(expected, rel=0, abs=tolerance)
    assert len({round(loss, 3) for loss in found}) > 3
    logits = [each(input_ids=IDS).logits for each in (shared, explicit)]
    torch.testing.assert_close(*logits, rtol=0, atol=100 * tolerance)
    # A run that goes on has the reference of its start.
    model = policy()
    shared = ReferenceModel(model)
    engine = engine_of(model, stage, kind, bf16)
    engine.load_checkpoint(tmp_path)
    assert preferred(engine, shared, range(3, 6)) == found[3:]


def test_stage_3_is_refused():
    model = policy()
    shared = ReferenceModel(model)
    with pytest.raises(
        ConfigError, match=r"ReferenceModel: at zero_optimization\.stage 3 no rank has whole weights"
    ):
        engine_of(model, 3, "static", False)
    del shared
