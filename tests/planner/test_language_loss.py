"""Which losses may be in chunks, judged without values: as a trial on real values judges."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from slimfit_ds.activations.language_head import chunk_language_model_loss
from slimfit_ds.planner.language_loss import takes_loss_in_chunks

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
EXPECTED = {
    "llama": True,
    "qwen3": True,
    "gpt2": True,
    "gpt_neox": True,
    "gemma2": False,  # soft caps
    "cohere": False,  # scaled logits
    "granite": False,
}


def build(kind):
    options = SMALL if kind != "gpt2" else {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
    # Far from 1, so that values show what is done to the logits.
    extra = {
        "cohere": {"logit_scale": 0.1},
        "granite": {"logits_scaling": 8.0},
        "gemma2": {"final_logit_softcapping": 0.02},
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **options, **extra.get(kind, {}))
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("kind", "expected"), EXPECTED.items())
def test_as_real_values_tell(kind, expected):
    ids = torch.zeros(1, 6, dtype=torch.long)
    model = build(kind)
    attributes = set(model.__dict__)
    assert takes_loss_in_chunks(model, {"input_ids": ids, "labels": ids}) is expected
    assert set(model.__dict__) == attributes
    try:
        chunk_language_model_loss(model).remove()
        possible = True
    except ValueError:
        possible = False
    assert possible is expected
    with torch.device("meta"):
        fake = build(kind)
        ids = torch.zeros(1, 6, dtype=torch.long)
        assert takes_loss_in_chunks(fake, {"input_ids": ids, "labels": ids}) is expected


def test_a_classifier_has_no_such_loss():
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.zeros(1, 6, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": torch.zeros(1, dtype=torch.long)}
    assert not takes_loss_in_chunks(BertForSequenceClassification(config), inputs)
