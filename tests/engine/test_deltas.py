"""What trained, out of an engine."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

import slimfit_ds
from slimfit_ds.deltas.delta import read_delta
from slimfit_ds.deltas.merge import load_merged


def engine_of(folder, stage: int = 1, policy: str = "static", seed: int = 0, bf16: bool = False):
    """An engine of a tiny BERT whose base lies in a folder."""
    base = folder / "base"
    if not base.exists():
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        BertForMaskedLM(config).save_pretrained(base)
    model = BertForMaskedLM.from_pretrained(base)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": stage},
        "slimfit": {"freeze": {"policy": policy, "rate": 0.7}},
    }
    return slimfit_ds.initialize(model=model, config=config)[0]


def train(engine, steps: int) -> list[float]:
    losses = []
    for step in range(engine.global_steps, engine.global_steps + steps):
        ids = torch.arange(24).view(2, 12).add(step) % 31
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("stage", "policy", "bf16"), [(1, "static", False), (3, "static", True), (2, "ils", False)]
)
def test_base_and_delta_are_the_engines_model(tmp_path, stage, policy, bf16):
    engine = engine_of(tmp_path, stage, policy, bf16=bf16)
    train(engine, 3)
    engine.save_delta(tmp_path / "delta.safetensors")
    engine.save_pretrained(tmp_path / "whole")
    merged = load_merged(tmp_path / "base", read_delta(tmp_path))
    whole = BertForMaskedLM.from_pretrained(tmp_path / "whole").state_dict()
    assert merged.state_dict().keys() == whole.keys()
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, whole[name]), name
        assert tensor.dtype == whole[name].dtype == (torch.bfloat16 if bf16 else torch.float32)
