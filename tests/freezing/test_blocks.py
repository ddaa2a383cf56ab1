from __future__ import annotations

from slimfit_ds.freezing.blocks import find_blocks


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
