"""Assumed active sets, and which losses may be computed in chunks: judged without values as with them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from slimfit_ds.activations.language_head import chunk_language_model_loss
from slimfit_ds.planner.step import choose_active, takes_loss_in_chunks
from slimfit_ds.schedule.schedule import room_at
from slimfit_ds.trainable.units import ParameterRoles, Unit

LAYERS = [Unit(f"l{i}", "linear", size) for i, size in enumerate([100, 1, 50, 50, 2, 10, 3, 4, 5, 6])]
ROLES = ParameterRoles(tuple(LAYERS))
SIZES = {layer.name: layer.numel for layer in LAYERS}


def choose(rate: float, kind: str, currency: str = "layers") -> list[str]:
    return choose_active(LAYERS, range(len(LAYERS)), room_at(ROLES, currency, rate), kind)


def test_worst_takes_the_largest_and_of_equals_the_later():
    assert choose(0.8, "worst") == ["l0", "l3"]


def test_expected_is_between_and_repeatable():
    chosen = choose(0.7, "expected")
    assert len(set(chosen)) == 3
    assert chosen == choose(0.7, "expected")
    assert sum(SIZES[name] for name in chosen) < sum(SIZES[name] for name in choose(0.7, "worst"))


def test_no_more_than_there_are():
    assert len(choose(0.0, "worst")) == len(LAYERS)
    assert len(choose(0.0, "expected")) == len(LAYERS)


def test_layers_that_may_not_train_are_left_out():
    free = [i for i in range(len(LAYERS)) if i != 0]
    assert "l0" not in choose_active(LAYERS, free, room_at(ROLES, "layers", 0.8), "worst")


@pytest.mark.parametrize("kind", ["expected", "worst"])
def test_a_budget_of_parameters_is_kept_and_used(kind):
    # 231 parameters; 40 % of them leave room for one of the 50s and most of the small ones.
    spent = sum(SIZES[name] for name in choose(0.6, kind, "parameters"))
    assert 0.8 * 0.4 * 231 < spent <= 0.4 * 231


def test_unknown_kind():
    with pytest.raises(ValueError, match="typical"):
        choose(0.9, "typical")


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
    "gemma2": True,  # soft caps
    "cohere": True,  # scaled logits
    "granite": True,
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


def test_a_scale_that_no_name_tells():
    model = build("llama")
    plain = type(model)

    class Scaled(plain):
        def forward(self, labels, **kwargs):
            logits = super().forward(**kwargs).logits * 0.1
            return self.loss_function(logits=logits, labels=labels, vocab_size=40)

    model.__class__ = Scaled
    ids = torch.zeros(1, 6, dtype=torch.long)
    assert not takes_loss_in_chunks(model, {"input_ids": ids, "labels": ids})


def test_a_classifier_has_no_such_loss():
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    ids = torch.zeros(1, 6, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": torch.zeros(1, dtype=torch.long)}
    assert not takes_loss_in_chunks(BertForSequenceClassification(config), inputs)
