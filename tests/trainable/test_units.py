from __future__ import annotations

import pytest
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from slimfit_ds.trainable.units import ParameterRoles, Unit, discover, find_blocks, match_globs


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.position = nn.Parameter(nn.init.zeros_(nn.Linear(4, 2).weight.detach().clone()))
        self.scale = nn.Parameter(nn.Linear(1, 4).bias.detach().clone())
        self.head = nn.Linear(4, 2)


def test_kinds_and_model_order():
    roles = discover(Mixed())
    # Parameters that a module holds itself come before those of its children.
    assert [(layer.name, layer.kind) for layer in roles.units] == [
        ("position", "parameter"),
        ("embed.weight", "embedding"),
        ("conv.weight", "convolution"),
        ("norm.weight", "norm"),
        ("head.weight", "linear"),
    ]
    assert roles.small == ("scale", "conv.bias", "norm.bias", "head.bias")
    assert roles.units[2].numel == 4 * 3 * 2 * 2
    # A vector added at each position, ids, a 2x2 patch of 3 channels, a norm, a linear input of 4.
    assert [layer.inputs for layer in roles.units] == [0, 0, 12, 0, 4]


def test_frozen_by_the_user_is_no_layer():
    model = Mixed()
    model.embed.weight.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    roles = discover(model)
    assert "embed.weight" not in roles.names
    assert roles.frozen == ("embed.weight", "head.bias")


def test_tied_weights_appear_once():
    config = BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = BertForMaskedLM(config)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    names = discover(model).names
    assert sum("word_embeddings" in name or "decoder.weight" in name for name in names) == 1


@pytest.mark.parametrize(
    ("model", "norms", "linears", "inputs"),
    [
        # Llama: q, k, v, o, gate, up, down and two RMSNorms for each block, a final norm and the head.
        (
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=16,
                    hidden_size=8,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    intermediate_size=16,
                )
            ),
            5,
            15,
            {8, 16},
        ),
        # GPT-2: c_attn, c_proj, c_fc, c_proj and two norms for each block, a final norm; the head is tied.
        (
            GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2)),
            5,
            8,
            {8, 32},
        ),
    ],
)
def test_architectures_without_a_class_map(model, norms, linears, inputs):
    layers = discover(model).units
    assert sum(layer.kind == "norm" for layer in layers) == norms
    assert sum(layer.kind == "linear" for layer in layers) == linears
    assert {layer.inputs for layer in layers if layer.kind == "linear"} == inputs


def named(*names: str, **more) -> ParameterRoles:
    return ParameterRoles(tuple(Unit(name, "linear", 1) for name in names), **more)


def test_globs_match_parameter_and_module_names():
    roles = named(
        "encoder.0.query.weight", "encoder.0.norm.weight", "classifier.weight", frozen=("x.weight",)
    )
    problems: list[str] = []
    assert match_globs(["classifier"], roles, "key", problems) == {2}
    assert match_globs(["*.norm.weight", "encoder.0.q*"], roles, "key", problems) == {0, 1}
    # It is frozen already: nothing to do, and nothing wrong.
    assert match_globs(["x"], roles, "key", problems) == frozenset()
    assert problems == []


def test_globs_match_the_other_name_of_a_tied_weight():
    shape = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(shape)
    roles, problems = discover(model), []
    assert "lm_head.weight" not in roles.names
    (tied,) = match_globs(["lm_head*"], roles, "key", problems)
    assert roles.names[tied] == "model.embed_tokens.weight"
    model.model.embed_tokens.weight.requires_grad_(False)
    assert match_globs(["lm_head*", "*embed_tokens*"], discover(model), "key", problems) == frozenset()
    assert problems == []


def test_glob_without_a_match_lists_near_names():
    problems: list[str] = []
    match_globs(
        ["clasifier*"], named("encoder.0.query.weight", "classifier.weight"), "freeze.always", problems
    )
    (problem,) = problems
    assert problem.startswith("freeze.always: 'clasifier*' matches no layer")
    assert problem.split("near names: ")[1].startswith("classifier.weight")


def test_bert_names():
    names = [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.LayerNorm.weight",
        *(f"bert.encoder.layer.{i}.{part}.weight" for i in (0, 1, 10) for part in ("query", "dense")),
        "bert.pooler.dense.weight",
        "classifier.weight",
    ]
    found = find_blocks(names)
    assert found.before == (0, 1)
    assert found.blocks == ((2, 3), (4, 5), (6, 7))
    assert found.after == (8, 9)


def test_the_longest_list_holds_the_blocks():
    # A stem of two numbered convolutions, then a list of blocks with numbered parts inside.
    names = ["stem.0.weight", "stem.1.weight"]
    names += [f"blocks.{i}.mlp.{j}.weight" for i in range(3) for j in range(2)] + ["head.weight"]
    found = find_blocks(names)
    assert found.before == (0, 1)
    assert found.blocks == ((2, 3), (4, 5), (6, 7))
    assert found.after == (8,)


def test_without_a_list_each_layer_is_a_block():
    assert find_blocks(["a.weight", "b.weight"]).blocks == ((0,), (1,))
