from __future__ import annotations

from slimfit_ds.trainable.blocks import find_blocks, find_head
from slimfit_ds.trainable.layers import Layer


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


def model(head: int, tail: str = "classifier") -> list[Layer]:
    blocks = [Layer(f"layers.{i}.{part}.weight", "linear", 100) for i in range(2) for part in "qv"]
    return [
        Layer("embed.weight", "embedding", 900),
        *blocks,
        Layer("norm.weight", "norm", 4),
        Layer(tail, "linear", head),
    ]


def test_the_head_is_the_last_linear_layer_behind_the_blocks():
    assert find_head(model(8)) == 6
    assert find_head([*model(8), Layer("after.weight", "norm", 4)]) == 6


def test_an_output_embedding_is_no_head():
    assert find_head(model(101)) is None
    assert find_head(model(8)[:-1]) is None


def test_without_blocks_there_is_no_head():
    assert find_head([Layer("a.weight", "linear", 4), Layer("b.weight", "linear", 2)]) is None
