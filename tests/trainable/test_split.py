"""Layers of which some input columns train, against plain layers with their gradient cut to those columns."""

from __future__ import annotations

import copy
import gc
import hashlib
import io
import itertools
import json
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

import slimfit_ds
from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.new_words import warn_of_new_words
from slimfit_ds.trainable.plan import plan_units
from slimfit_ds.trainable.split import (
    _KEPT,
    SplitModule,
    adopt_columns,
    column_places,
    fill_columns,
    split_columns,
    unsplit_columns,
)
from slimfit_ds.trainable.units import discover


class Block(nn.Module):
    def __init__(self, width: int = 40):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding, two blocks and a head; `[batch, tokens]` ids to `[batch, 3]`."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 40)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(40, 3)

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def bert(hidden_size: int = 40, intermediate_size: int = 80):
    """With 512 positions, two types and two classes."""
    from transformers import BertConfig, BertForSequenceClassification

    shape = BertConfig(
        vocab_size=300,
        hidden_size=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=intermediate_size,
    )
    return BertForSequenceClassification(shape)


LINEAR = [f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")]
SPLIT = ["words", *LINEAR]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def ids():
    return torch.randint(0, 50, (6, 7), generator=torch.Generator().manual_seed(1))


def split(model, rate: float = 0.8, seed: int = 0, **more) -> None:
    split_columns(model, plan_units(model, rate=rate, **more), seed)


def columns_of(module) -> list[int]:
    """The trained columns, found by looking which of them the parameter changes."""
    weight = module.weight.detach().clone()
    marked = torch.full_like(module.weight_columns, 1e6)
    return (module.split.fill(weight, marked) == 1e6).any(0).nonzero().flatten().tolist()


def moves_of_a_step(model, ids, block) -> dict[str, torch.Tensor]:
    """How far one step of SGD takes each parameter, by name."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    slimfit_ds.slim(model, block).follow(optimizer)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(ids).square().sum().backward()
    optimizer.step()
    return {name: p.detach() - start[name] for name, p in model.named_parameters()}


def test_output_and_gradients_are_those_of_the_whole_layer_cut_to_the_columns(model, ids):
    plain = copy.deepcopy(model)
    split(model)
    out, expected = model(ids), plain(ids)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for name in SPLIT:
        mine, whole = model.get_submodule(name), plain.get_submodule(name)
        cut = whole.weight.grad[: len(mine.weight_columns), columns_of(mine)]
        torch.testing.assert_close(mine.weight_columns.grad, cut, rtol=1e-5, atol=1e-6)
        assert mine.weight.grad is None
        if getattr(whole, "bias", None) is not None:
            torch.testing.assert_close(mine.bias.grad, whole.bias.grad)
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)
    torch.testing.assert_close(model.blocks[0].norm.weight.grad, plain.blocks[0].norm.weight.grad)


def test_training_is_that_of_the_whole_model_with_masked_gradients(model, ids):
    plain = copy.deepcopy(model)
    split(model)
    for name in SPLIT:
        mask = torch.zeros(plain.get_submodule(name).weight.shape)
        mask[: len(model.get_submodule(name).weight_columns), columns_of(model.get_submodule(name))] = 1
        plain.get_submodule(name).weight.register_hook(lambda grad, mask=mask: grad * mask)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for each in (model, plain):
        optimizer = torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            each(ids).square().sum().backward()
            optimizer.step()
    trained = model.state_dict()
    assert trained.keys() == before.keys()
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-5)
    for name in SPLIT:
        rest = [
            c
            for c in range(before[f"{name}.weight"].shape[1])
            if c not in columns_of(model.get_submodule(name))
        ]
        assert torch.equal(trained[f"{name}.weight"][:, rest], before[f"{name}.weight"][:, rest])
        assert not torch.equal(trained[f"{name}.weight"], before[f"{name}.weight"])


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.9, 0.95])
def test_weights_and_inputs_keep_to_the_rate(rate):
    model = nn.ModuleDict(
        {"words": nn.Embedding(100, 40), "blocks": nn.ModuleList(Block(80) for _ in range(3))}
    )
    layers = discover(model).units
    weights, inputs = sum(layer.numel for layer in layers), sum(layer.inputs for layer in layers)
    split(model, rate)
    trained = discover(model).units
    assert 0 < sum(layer.numel for layer in trained) <= (1 - rate) * weights + 1e-6
    assert 0 < sum(layer.inputs for layer in trained) <= (1 - rate) * inputs + 1e-6
    # Not half of what would be allowed.
    assert sum(layer.inputs for layer in trained) > 0.6 * (1 - rate) * inputs


def test_every_tensor_that_is_read_has_the_same_number_of_columns():
    plan = plan_units(bert(hidden_size=64, intermediate_size=256), rate=0.9)
    words, *linear = plan.split
    assert len(linear) == 12
    (count,) = {each.count for each in linear}
    # By hand: a column has 9 * 64 outputs in each of two blocks, 4 sources of them 7 * 64 inputs.
    numel = 300 * 64 + 512 * 64 + 2 * 64 + 64 * 5 + 2 * 12 * 64**2 + 64**2 + 2 * 64
    whole = 64 * 5 + 64**2 + 2 * 64
    by_weights = (0.1 * numel - whole) / (2 * 9 * 64)
    by_inputs = 0.1 * (2 * 7 * 64 + 64 + 64) / (2 * 4)
    assert count == int(min(by_weights, by_inputs))
    assert words.layer.name == "bert.embeddings.word_embeddings.weight"
    # As many places as a layer has columns, of the words that the weights which the layers leave are enough for.
    left = 0.1 * numel - whole - count * 2 * 9 * 64
    assert (words.count, words.rows) == (count, int(left / count) if left < 300 * count else None)


def test_the_word_embedding_trains_an_eighth_of_the_words_or_more():
    words, blocks = nn.Embedding(2_000, 60), nn.ModuleList(Block(200) for _ in range(3))
    plan = plan_units(nn.ModuleDict({"words": words, "blocks": blocks}), rate=0.9)
    embedding, *linear = plan.split
    (count,) = {each.count for each in linear}

    def words_for(count: int) -> int:
        """What so many columns of each layer leave of the weights."""
        room = 0.1 * (2_000 * 60 + 3 * (200 + 2 * 200 * 400)) - 3 * 200
        return int((room - count * 3 * 600) / count)

    assert embedding.count == count
    assert embedding.rows == words_for(count) >= 2_000 / 8
    # The inputs would allow more columns of a layer, and the weights too.
    assert (count + 1) * 6 <= 0.1 * 3 * 600
    assert 0 < words_for(count + 1) < 2_000 / 8


def test_words_behind_the_front_of_the_vocabulary_stay_as_they_are(model):
    split(model)
    rows, places = len(model.words.weight_columns), columns_of(model.words)
    assert 0 < rows < 50
    before, plain = model.words.weight.detach().clone(), copy.deepcopy(model.words.weight.detach())
    with torch.no_grad():
        model.words.weight_columns.add_(1)
    plain[:rows, places] += 1
    # All ids, in two dimensions; the last trained word and the first that is not among them.
    ids = torch.arange(50).view(5, 10)
    assert torch.equal(model.words(ids), plain[ids])
    weights = torch.randn(5, 10, 40, generator=torch.Generator().manual_seed(0))
    (model.words(ids) * weights).sum().backward()
    by_word = weights.view(50, 40)[:rows, places]
    torch.testing.assert_close(model.words.weight_columns.grad, by_word)
    assert torch.equal(model.words.weight[rows:], before[rows:])
    assert torch.equal(model.state_dict()["words.weight"], plain)


def test_a_vector_of_one_place_stays_frozen():
    plan = plan_units(
        nn.ModuleDict({"words": nn.Embedding(50, 1), "blocks": nn.ModuleList([Block(), Block()])}), rate=0.8
    )
    assert not any("words" in each.layer.name for each in plan.split)


def test_all_words_train_where_the_weights_are_enough():
    plan = plan_units(
        nn.ModuleDict(
            {"words": nn.Embedding(30, 100), "blocks": nn.ModuleList(Block(200) for _ in range(3))}
        ),
        rate=0.9,
    )
    embedding, *linear = plan.split
    assert (embedding.rows, embedding.count) == (None, linear[0].count)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_an_embedding_that_computes_in_a_way_of_its_own_stays_frozen(model, options):
    model.words = nn.Embedding(50, 40, **options)
    assert [each.layer.name for each in plan_units(model, rate=0.8).split] == [f"{n}.weight" for n in LINEAR]
    split(model)
    assert not model.words.weight.requires_grad


def test_words_are_what_a_model_takes_for_its_inputs():
    # 512 positions are more than 300 words, and a ViT has none.
    from transformers import GPT2Config, GPT2ForSequenceClassification, ViTConfig, ViTForImageClassification

    names = {each.layer.name for each in plan_units(bert(), rate=0.8).split}
    assert {name for name in names if "embedding" in name} == {"bert.embeddings.word_embeddings.weight"}
    shape = GPT2Config(vocab_size=300, n_embd=40, n_layer=2, n_head=2)
    names = {each.layer.name for each in plan_units(GPT2ForSequenceClassification(shape), rate=0.8).split}
    assert {name for name in names if name.startswith("transformer.w")} == {"transformer.wte.weight"}
    vit = ViTConfig(hidden_size=40, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80)
    names = {each.layer.name for each in plan_units(ViTForImageClassification(vit), rate=0.8).split}
    assert not any("embedding" in name for name in names)


def test_the_vector_of_the_padding_token_stays(model, ids):
    model.words = nn.Embedding(50, 40, padding_idx=3)
    plain = copy.deepcopy(model)
    split(model)
    ids[:, 0] = 3
    for each in (model, plain):
        each(ids).square().sum().backward()
    gradient = model.words.weight_columns.grad
    assert not gradient[3].any()
    torch.testing.assert_close(gradient, plain.words.weight.grad[: len(gradient), columns_of(model.words)])


def test_the_embedding_keeps_no_more_than_the_ids(model, ids):
    split(model)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model.words(ids)
    assert [t.data_ptr() for t in saved] == [ids.data_ptr()]


@pytest.mark.parametrize("scale", [10.0, "auto"])
def test_the_rate_of_the_embedding_has_a_factor_of_its_own(model, ids, scale):
    plain = copy.deepcopy(model)
    for each, factor in ((model, scale), (plain, 1.0)):
        block = {"freeze": {"policy": "static", "rate": 0.8, "embedding_lr_scale": factor}}
        each.moved = moves_of_a_step(each, ids, block)
    # As many places move so much further that a whole vector moves as far, in the norm.
    expected = 10.0 if scale == 10.0 else (40 / model.words.split.count) ** 0.5
    for name, moved in model.moved.items():
        factor = expected if name == "words.weight_columns" else 1.0
        torch.testing.assert_close(moved, factor * plain.moved[name], rtol=1e-3, atol=1e-6)


def test_layers_that_read_the_same_tensor_share_one_copy():
    model = bert()
    split(model)
    attention = model.bert.encoder.layer[0].attention
    layers = [attention.self.query, attention.self.key, attention.self.value]
    assert columns_of(layers[0]) == columns_of(layers[1]) == columns_of(layers[2])
    x = torch.randn(2, 5, 40, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in attention.parameters()}
    saved: set[int] = set()

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = sum(layer(x) for layer in layers)
        # Nothing is shared with a tensor that was changed since.
        with torch.no_grad():
            x.mul_(2)
        other = layers[0](x)
    assert len(saved) == 2
    (out + other).sum().backward()
    inputs = (0.5 * x.detach())[..., columns_of(layers[0])].sum((0, 1))
    torch.testing.assert_close(layers[1].weight_columns.grad, inputs.expand(40, -1))
    torch.testing.assert_close(layers[0].weight_columns.grad, 3 * inputs.expand(40, -1))


def test_queries_of_cross_attention_read_a_tensor_of_their_own():
    from transformers import T5Config, T5ForConditionalGeneration

    shape = T5Config(vocab_size=300, d_model=40, d_kv=20, d_ff=80, num_layers=1, num_heads=2)
    source = {e.layer.name: e.source for e in plan_units(T5ForConditionalGeneration(shape), rate=0.8).split}
    own = "decoder.block.0.layer.0.SelfAttention"
    assert source[f"{own}.q.weight"] == source[f"{own}.v.weight"]
    cross = "decoder.block.0.layer.1.EncDecAttention"
    assert source[f"{cross}.q.weight"] != source[f"{cross}.k.weight"]


def test_the_columns_are_evenly_spaced_and_drawn_by_the_seed(model):
    other, again = copy.deepcopy(model), copy.deepcopy(model)
    split(model)
    split(other, seed=1)
    split(again)
    places = [columns_of(model.get_submodule(name)) for name in SPLIT]
    assert all(len({b - a for a, b in itertools.pairwise(p)}) == 1 for p in places)
    assert places == [columns_of(again.get_submodule(name)) for name in SPLIT]
    assert places != [columns_of(other.get_submodule(name)) for name in SPLIT]


def test_only_the_columns_of_the_input_are_kept(model, ids):
    split(model)
    saved: list[int] = []
    layer = model.blocks[0].down
    x = torch.randn(6, 7, 80, requires_grad=True)
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            saved.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert saved == [6 * 7 * layer.split.count * 4]
    saved.clear()
    layer.weight_columns.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert saved == []


def test_under_autocast_it_computes_as_a_linear_layer_does(model, ids):
    plain = copy.deepcopy(model)
    split(model)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = model(ids), plain(ids)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.float().square().sum().backward()
    expected.float().square().sum().backward()
    mine, whole = model.blocks[1].up, plain.blocks[1].up
    assert mine.weight_columns.grad.dtype == torch.float32
    torch.testing.assert_close(
        mine.weight_columns.grad, whole.weight.grad[:, columns_of(mine)], rtol=0.05, atol=0.05
    )


def test_conv1d_of_gpt2_is_split_along_its_inputs():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.ModuleDict({"h": nn.ModuleList([nn.ModuleDict({"fc": Conv1D(24, 40)})])})
    plain = copy.deepcopy(model)
    split(model)
    layer, whole = model["h"][0]["fc"], plain["h"][0]["fc"]
    x = torch.randn(5, 40)
    torch.testing.assert_close(layer(x), whole(x))
    layer(x).square().sum().backward()
    whole(x).square().sum().backward()
    places = (layer.split.fill(torch.zeros(40, 24), torch.ones_like(layer.weight_columns)).mT == 1).all(1)
    torch.testing.assert_close(layer.weight_columns.grad, whole.weight.grad[places])
    assert type(layer).__name__ == "Conv1D"


def test_a_state_dict_knows_whole_weights_only_and_loads_them(model, ids):
    keys = set(model.state_dict())
    split(model)
    with torch.no_grad():
        model.blocks[0].up.weight_columns.add_(1.0)
    expected = model(ids)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert set(state) == keys
    plain = Model()
    plain.load_state_dict(state)
    assert torch.equal(plain(ids), expected)
    again = Model()
    split(again)
    again.load_state_dict(state)
    assert torch.equal(again(ids), expected)
    assert torch.equal(again.blocks[0].up.weight_columns, model.blocks[0].up.weight_columns)


def test_merging_a_dict_of_all_parameters(model):
    split(model)
    everything = {name: p.detach().clone() for name, p in model.named_parameters()}
    everything["blocks.0.up.weight_columns"] += 1
    merged = fill_columns(everything, column_places(model))
    assert not any(name.endswith("columns") for name in merged)
    moved = merged["blocks.0.up.weight"] - everything["blocks.0.up.weight"]
    assert moved.count_nonzero(0).nonzero().flatten().tolist() == columns_of(model.blocks[0].up)


def test_an_optimizer_that_is_older_than_the_split_trains_the_columns(model, ids):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slimfit_ds.slim(model, {"freeze": {"policy": "static", "rate": 0.8}}).follow(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(model.get_submodule(name).weight_columns) for name in SPLIT} <= held
    before = model.blocks[0].up.weight_columns.detach().clone()
    model(ids).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.blocks[0].up.weight_columns, before)
    # Twice changes nothing.
    adopt_columns(model, optimizer.param_groups)
    assert len({id(p) for g in optimizer.param_groups for p in g["params"]}) == len(held)


def test_head_norms_and_biases_may_have_a_learning_rate_of_their_own(model, ids):
    plain = copy.deepcopy(model)
    for each, scale in ((model, 3.0), (plain, 1.0)):
        block = {
            "freeze": {"policy": "static", "rate": 0.8, "always_lr_scale": scale, "embedding_lr_scale": 1.0}
        }
        each.moved = moves_of_a_step(each, ids, block)
    for name, moved in model.moved.items():
        factor = 1.0 if name.endswith("weight_columns") else 3.0
        torch.testing.assert_close(moved, factor * plain.moved[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("inactive", ["device", "host"])
def test_an_optimizer_goes_on_with_whole_weights_and_may_be_followed_again(model, ids, inactive):
    config = {"freeze": {"policy": "static", "rate": 0.8}, "optimizer_states": {"inactive": inactive}}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 2}

    def moved() -> dict[str, float]:
        before = {name: p.detach().clone() for name, p in weights.items()}
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
        return {
            name: (p.detach() != before[name]).float().mean().item()
            for name, p in model.state_dict().items()
            if name in before
        }

    for _ in range(2):
        handle = slimfit_ds.slim(model, config)
        handle.follow(optimizer)
        columns = moved()
        assert any(0 < share < 0.5 for share in columns.values())
        handle.remove()
        whole = moved()
        assert {*map(id, weights.values())} <= {id(p) for g in optimizer.param_groups for p in g["params"]}
        assert all(whole[name] > columns[name] for name in columns if 0 < columns[name] < 0.5)


def test_removing_leaves_a_plain_model_with_what_was_learned(model, ids):
    # Frozen by the user before: not ours to wake.
    model.blocks[0].norm.bias.requires_grad_(False)
    model.blocks[1].up.weight.requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    handle = slimfit_ds.slim(model, {"freeze": {"policy": "static", "rate": 0.8}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.follow(optimizer)
    model(ids).square().sum().backward()
    optimizer.step()
    expected = model(ids)
    handle.remove()
    assert torch.equal(model(ids), expected)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    start = Model()
    model.load_state_dict(start.state_dict())
    assert torch.equal(model(ids), start(ids))
    assert not any(name.endswith("columns") for name, _ in model.named_parameters())
    assert type(model.blocks[0].up) is nn.Linear


def test_moments_of_a_whole_weight_are_not_taken_for_those_of_its_columns(model, ids):
    optimizer = torch.optim.Adam(model.parameters())
    model(ids).square().sum().backward()
    optimizer.step()
    slimfit_ds.slim(model, {"freeze": {"policy": "static", "rate": 0.8}}).follow(optimizer)
    optimizer.zero_grad()
    model(ids).square().sum().backward()
    optimizer.step()
    columns = model.blocks[0].up.weight_columns
    assert optimizer.state[columns]["exp_avg"].shape == columns.shape
    assert optimizer.state[columns]["step"] == 1


def test_globs_choose_what_trains_whole_and_what_never_trains(model):
    plan = plan_units(model, rate=0.5, always=("blocks.1.up",), never=("blocks.0.*",))
    assert [each.layer.name for each in plan.split] == ["words.weight", "blocks.1.down.weight"]
    assert plan.whole == {"blocks.1.up.weight", "blocks.1.norm.weight", "head.weight"}


def test_pooler_and_classifier_train_whole_and_a_language_models_output_does_not():
    from transformers import BertForMaskedLM

    model = bert()
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= plan_units(model, rate=0.8).whole
    plan = plan_units(BertForMaskedLM(model.config), rate=0.8)
    embedding = "bert.embeddings.word_embeddings.weight"
    assert embedding not in plan.whole | {each.layer.name for each in plan.split}


def test_what_cannot_be_is_said_before_anything_is_changed(model):
    with pytest.raises(ConfigError, match=r"rate 0.999; lower the rate"):
        split(model, 0.999)
    with pytest.raises(ConfigError, match="matches no layer") as caught:
        split(model, always=("nothing.*", "head"), never=("h*",))
    assert "'head.weight' is matched by always_active and by never_active" in caught.value.problems[-1]
    assert all(p.requires_grad for p in model.parameters())


def test_a_width_splits_every_layer_to_that_share(model):
    plan = plan_units(model, width=0.1, never=("blocks.1.down",))
    assert {each.layer.name: each.count for each in plan.split} == {
        "words.weight": 4,
        "blocks.0.up.weight": 4,
        "blocks.0.down.weight": 8,
        "blocks.1.up.weight": 4,
    }
    assert all(each.rows is None for each in plan.split)
    assert plan.whole == {"blocks.0.norm.weight", "blocks.1.norm.weight", "head.weight"}
    split_columns(model, plan)
    assert {unit.width for unit in discover(model).units if unit.name.endswith("columns")} == {0.1}


@pytest.mark.parametrize("wish", [{"rate": 0.8}, {"width": 0.3}])
def test_a_plan_says_what_is_discovered_after_the_split(wish):
    model = bert()
    model.classifier.weight.requires_grad_(False)
    before = discover(model)
    plan = plan_units(model, **wish, never=("*attention.self.key*",))
    split_columns(model, plan)
    after = discover(model)
    assert (after.units, after.small, set(after.frozen)) == (
        plan.roles.units,
        plan.roles.small,
        set(plan.roles.frozen),
    )
    assert (
        (after.layers, after.numel) == (plan.roles.layers, plan.roles.numel) == (before.layers, before.numel)
    )


def test_a_weight_that_two_layers_hold_is_not_split(model, ids):
    model.blocks[1].up.weight = model.blocks[0].up.weight
    names = {each.layer.name for each in plan_units(model, width=0.1).split}
    assert names == {"words.weight", "blocks.0.down.weight", "blocks.1.down.weight"}


def test_the_recommended_units_are_those_of_the_fidelity_study():
    """Columns, rows and what trains at all, as recorded at c71cc45, where `policy: columns` chose them."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    small = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertForSequenceClassification(BertConfig(vocab_size=2000, intermediate_size=384, **small))
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=1000, num_key_value_heads=2, intermediate_size=256, **small)
    )
    vit = ViTForImageClassification(ViTConfig(intermediate_size=384, image_size=32, patch_size=8, **small))
    gpt2 = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=2000, n_embd=96, n_layer=2, n_head=4, n_positions=64)
    )
    # Columns of a layer, words, all elements that train, and a hash of names and places.
    expected = {
        ("bert", 0.9, 0): (18, 347, 49544, "e27c59cceb7b"),
        ("bert", 0.95, 3): (6, 560, 25922, "cd8c8c9c9d37"),
        ("llama", 0.9, 0): (14, 996, 39512, "c9ace731661a"),
        ("llama", 0.95, 3): (7, 962, 19758, "a60779158cf0"),
        ("vit", 0.9, 0): (12, None, 25442, "a2308b3120c5"),
        ("vit", 0.95, 3): (5, None, 13346, "a1de74077662"),
        ("gpt2", 0.9, 0): (18, 568, 44208, "6ca00b2a394c"),
        ("gpt2", 0.95, 3): (9, 530, 23202, "98530b9c5910"),
    }
    models = {"bert": bert, "llama": llama, "vit": vit, "gpt2": gpt2}
    found = {}
    for name, rate, seed in expected:
        handle = slimfit_ds.slim(models[name], {"freeze": {"rate": rate, "seed": seed}})
        places = column_places(models[name])
        trained = {n: p.numel() for n, p in models[name].named_parameters() if p.requires_grad}
        text = json.dumps([sorted((key, list(place)) for key, place in places.items()), sorted(trained)])
        ((count,), words) = {place[2] for place in places.values()}, [p[4] for p in places.values() if p[4]]
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        found[name, rate, seed] = (count, *(words or [None]), sum(trained.values()), digest)
        handle.remove()
    assert found == expected


@pytest.mark.parametrize("copied", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("kind", ["own", "gpt2"])
def test_a_split_model_is_copied_whole(model, ids, copied, kind):
    if kind == "gpt2":
        from transformers import GPT2Config, GPT2ForSequenceClassification

        shape = GPT2Config(vocab_size=50, n_embd=40, n_layer=2, n_head=2, pad_token_id=0)
        model = GPT2ForSequenceClassification(shape).eval()
    split(model)
    if copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert discover(other) == discover(model)
    assert {type(m) for m in other.modules()} == {type(m) for m in model.modules()}
    results = []
    for each in (model, other):
        out = each(ids) if kind == "own" else each(ids).logits
        out.square().sum().backward()
        results.append([out, *(p.grad for p in each.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # Two models, not two views of one; each becomes whole again by itself.
    unsplit_columns(other)
    assert all(p.requires_grad for p in other.parameters())
    assert not all(p.requires_grad for p in model.parameters())


def test_one_class_for_each_class_of_layer(model):
    split(model)
    split_classes = {type(model.get_submodule(name)) for name in SPLIT}
    assert {cls.__name__ for cls in split_classes} == {"Linear", "Embedding"}
    assert len(split_classes) == 2


def test_printing_a_model_shows_what_trains(model):
    from transformers.pytorch_utils import Conv1D

    model.blocks[0].up = Conv1D(80, 40)
    split_columns(model, plan_units(model, width=0.1))
    lines = str(model)
    assert "(down): Linear(in_features=80, out_features=40, bias=False, trains 8 of 80 columns)" in lines
    assert "(up): Conv1D(nf=80, nx=40, trains 4 of 40 columns)" in lines
    assert "(head): Linear(in_features=40, out_features=3, bias=True)" in lines
    again = Model()
    split(again)
    rows = len(again.words.weight_columns)
    assert f"trains {again.words.split.count} of 40 columns of {rows} words)" in str(again)


def test_nothing_is_left_on_the_tensors_that_a_model_reads(model, ids):
    split(model)
    x = torch.randn(6, 7, 40, requires_grad=True)
    before = dict(x.__dict__)
    out = model.blocks[0].up(x)
    assert x.__dict__ == before
    kept = weakref.ref(_KEPT[x][1])
    del x, out
    gc.collect()
    assert kept() is None


def test_only_the_units_that_a_policy_has_chosen_move(model, ids):
    block = {"freeze": {"policy": "ils", "rate": 0.9, "width": 0.2}}
    plain = model.state_dict()
    plain = {name: weight.clone() for name, weight in plain.items()}
    handle = slimfit_ds.slim(model, block)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle.follow(optimizer)
    seen = set()
    for _ in range(8):
        active = handle.active_layers
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(ids).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        units = {name for name in moved if name in handle.schedule.names}
        # Of some words there is no gradient; of the rest everything moves that is active.
        assert units == set(active)
        narrow = {name for name in active if name.endswith("columns")}
        # Half of five units of a fifth each; norms and head always.
        assert len(narrow) == 2
        assert active - narrow == {"blocks.0.norm.weight", "blocks.1.norm.weight", "head.weight"}
        seen |= narrow
    assert seen == {f"{name}.weight_columns" for name in SPLIT}
    places = column_places(model)
    handle.remove()
    for name, weight in model.state_dict().items():
        changed = weight != plain[name]
        if name in places:
            start, stride, count, _, _ = places[name]
            assert not changed[
                :,
                [
                    c
                    for c in range(changed.shape[1])
                    if (c - start) % stride or not 0 <= c - start < stride * count
                ],
            ].any()
        assert changed.any()


class ReadsWeights(nn.Module):
    """Changes results of layers in place, and reads the weights of two layers that it never calls."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 40)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        for block in self.blocks:
            block.mixed = nn.Linear(40, 40)
        self.head = nn.Linear(40, 3)

    def forward(self, ids):
        x = self.words(ids)
        x[:, 0] = 0
        for block in self.blocks:
            mixed = block.mixed
            y = block.up(block.norm(x))
            y *= 0.5
            y[:, 1] = 1
            x = x + block.down(y.tanh())
            x = x + nn.functional.linear(x, mixed.weight, mixed.bias) + mixed.weight.square().mean(0)
        return self.head(x.mean(1)) + (self.words.weight.sum(0) * x.mean(1)).sum(-1, keepdim=True)


def test_layers_changed_in_place_or_read_without_a_call_get_the_gradients_of_the_whole_layer(ids):
    torch.manual_seed(0)
    model = ReadsWeights()
    plain = copy.deepcopy(model)
    split(model)
    names = [n for n, m in model.named_modules() if isinstance(m, SplitModule)]
    assert {"words", "blocks.0.mixed", "blocks.1.mixed", "blocks.0.up"} <= set(names)
    for each in (model, plain):
        each(ids).square().sum().backward()
    for name in names:
        mine, whole = model.get_submodule(name), plain.get_submodule(name)
        cut = whole.weight.grad[: len(mine.weight_columns), columns_of(mine)]
        torch.testing.assert_close(mine.weight_columns.grad, cut, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SplitModule):
                module.weight_columns += 1
    # Whoever reads a weight finds what was learned, and outside of forward passes the parameter itself.
    expected = ReadsWeights()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(ids), expected(ids))
    assert model.blocks[0].mixed.weight is model.get_parameter("blocks.0.mixed.weight")


def test_a_weight_that_is_read_without_a_call_gets_its_gradient_in_recomputed_blocks_too(ids):
    from slimfit_ds.activations.checkpoint import checkpoint

    torch.manual_seed(0)
    model = ReadsWeights()
    split(model)
    plain = copy.deepcopy(model)
    plain(ids).square().sum().backward()
    checkpoint(model.forward, ids, codec="exact").square().sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize(("rate", "words"), [(0.9, "the first [0-9]+ words trains"), (0.5, None)])
def test_added_words_that_will_not_learn_are_named(rate, words, recwarn):
    torch.manual_seed(0)
    model = bert()
    model.resize_token_embeddings(302)
    split(model, rate=rate)
    warn_of_new_words(model)
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (words is not None)
    if words is not None:
        pattern = (
            rf"2 added tokens will not learn \(ids 300, 301\).*{words}.*'bert.embeddings.word_embeddings'"
        )
        assert re.match(pattern, said[0])


def test_a_model_without_words_has_none_to_name(recwarn):
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = Wav2Vec2Model(
        Wav2Vec2Config(**sizes, conv_dim=(16,), conv_stride=(4,), conv_kernel=(8,), num_feat_extract_layers=1,
                       num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
    )  # fmt: skip
    split(model, rate=0.5)
    recwarn.clear()
    warn_of_new_words(model)
    assert not recwarn.list


def test_added_words_of_a_tied_vocabulary_are_named():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 40, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, tie_word_embeddings=True))
    model.resize_token_embeddings(301)
    warn_of_new_words(model)
    split(model, rate=0.9)
    with pytest.warns(
        UserWarning, match=r"added tokens will not learn \(ids 300\).*nothing trains under policy static"
    ):
        warn_of_new_words(model)


def test_a_quantised_base_is_refused_by_name(model):
    """As bitsandbytes' 4-bit layers are: `[packed, 1]` of uint8, that no gradient reaches."""
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        packed = torch.zeros(module.weight.numel() // 2, 1, dtype=torch.uint8)
        module.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(
        ConfigError, match=r"weights hold packed integers .* of torch.uint8, a quantised .* in bf16"
    ):
        plan_units(model, rate=0.9)
