"""The chunked loss of language models against transformers' own."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny_models import DECODER, batch_for, build, gradients, relative_error

from slimfit_ds.activations.language_head import chunk_language_model_loss


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "mistral"])
def test_loss_and_gradients_are_those_of_the_model(name):
    model = build(name)
    batch = batch_for(name)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    loss, expected = gradients(model, batch)
    state = chunk_language_model_loss(model, chunk_tokens=7)
    found_loss, found = gradients(model, batch)
    torch.testing.assert_close(found_loss, loss)
    assert relative_error(found, expected) < 1e-5
    assert model(**batch).logits.shape[-1] == 0
    with torch.no_grad():
        assert model(**batch).logits.shape[-1] == 60
    state.remove()
    assert model(**batch).logits.shape[-1] == 60
    torch.testing.assert_close(gradients(model, batch)[0], loss)


def test_divides_by_the_items_of_the_whole_accumulated_batch():
    model, batch = build("llama"), batch_for("llama")
    expected = model(**batch, num_items_in_batch=100).loss
    chunk_language_model_loss(model)
    torch.testing.assert_close(model(**batch, num_items_in_batch=100).loss, expected)


def test_a_model_whose_logits_are_changed_after_the_head_is_refused():
    model = build("llama")
    original = type(model).forward

    class Capped(type(model)):
        def forward(self, **kwargs):
            labels = kwargs.pop("labels")
            logits = original(self, **kwargs).logits * 0.1
            return type(
                "Output", (), {"loss": self.loss_function(logits=logits, labels=labels, vocab_size=60)}
            )

    model.__class__ = Capped
    with pytest.raises(ValueError, match="not the shifted cross-entropy"):
        chunk_language_model_loss(model)


@pytest.mark.parametrize("config", [hf.MixtralConfig, hf.OlmoeConfig])
def test_a_mixture_of_experts_keeps_the_load_balance_in_its_loss(config):
    """Its class hands the vocabulary's size to `loss_function` by position."""
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = hf.AutoModelForCausalLM.from_config(
        config(**DECODER, **experts, output_router_logits=True, router_aux_loss_coef=1.0)
    ).train()
    batch = batch_for("llama")
    loss, expected = gradients(model, batch)
    chunk_language_model_loss(model, chunk_tokens=7)
    found_loss, found = gradients(model, batch)
    torch.testing.assert_close(found_loss, loss)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (hf.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 0.5}),
        (hf.GraniteConfig, {"logits_scaling": 8.0}),
        (hf.CohereConfig, {"logit_scale": 0.0625}),
        (hf.HyperCLOVAXConfig, {"logits_scaling": 0.25}),
    ],
)
def test_soft_caps_and_scales_behind_the_head(config, values):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config(**DECODER, **values)).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    batch = batch_for("llama")
    loss, expected = gradients(model, batch)
    state = chunk_language_model_loss(model, chunk_tokens=7)
    assert (state.scale, state.cap) != (1.0, None)
    found_loss, found = gradients(model, batch)
    torch.testing.assert_close(found_loss, loss)
    assert relative_error(found, expected) < 1e-5


def test_a_soft_cap_that_no_name_tells_is_refused_for_a_new_model_too():
    """Logits of a model that has not learned are so small that a soft cap changes nothing."""
    model = hf.AutoModelForCausalLM.from_config(hf.Gemma2Config(**DECODER, head_dim=8))
    original = type(model).forward

    class Renamed(type(model)):
        def forward(self, **kwargs):
            self.config.final_logit_softcapping = 30.0
            try:
                return original(self, **kwargs)
            finally:
                self.config.final_logit_softcapping = None

    model.__class__ = Renamed
    model.config.final_logit_softcapping = None
    with pytest.raises(ValueError, match="not the shifted cross-entropy"):
        chunk_language_model_loss(model)


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_other_models_are_refused_and_left_as_they_were(name):
    model, batch = build(name), batch_for(name)
    loss = gradients(model, batch)[0]
    with pytest.raises(ValueError, match=r"head|loss"):
        chunk_language_model_loss(model)
    assert torch.equal(gradients(model, batch)[0], loss)
