"""Bytes that a block keeps for its backward pass, against closed forms of what each preset stores."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import ActivationsConfig

BATCH, SEQ, WIDTH, INNER = 4, 16, 128, 512
TOKENS = BATCH * SEQ


def kept(layers: int, config: ActivationsConfig, trains: str | None) -> int:
    """Bytes of all storages that a forward pass keeps besides parameters."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4, "vocab_size": 50}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = hf.BertForSequenceClassification(hf.BertConfig(num_hidden_layers=layers, **sizes, **dropout))
    model.train()
    for name, parameter in model.named_parameters():
        # Something below the blocks trains, so that every block has a backward pass.
        inside = trains is not None and trains in name
        parameter.requires_grad_(name.endswith("embeddings.LayerNorm.bias") or inside)
    compress(model, config)
    ids = torch.randint(50, (BATCH, SEQ))
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage()._cdata, t), lambda t: t
    ):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.zeros(BATCH).long())
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in own)


def per_block(config: ActivationsConfig, trains: str | None = None) -> float:
    """Bytes per token and block of a second and third block."""
    return (kept(3, config, trains) - kept(1, config, trains)) / 2 / TOKENS


def integers(bits: int, group: int, width: int = WIDTH) -> float:
    """Codes, and a bf16 step for each group."""
    return width * (bits / 8 + 2 / group)


STATISTICS = 2 + 2 * 4 * WIDTH / TOKENS  # size of the row in bf16, mean and deviation of each channel in fp32
RSTD = 4
BLOCK = {
    "minimal": integers(8, 32) + STATISTICS,
    # Of every second block.
    "ultra": (integers(8, 32) + STATISTICS) / 2,
    # Two norms; queries, keys and values; five bits for each input of the GELU.
    "balanced": 2 * (integers(4, 32) + RSTD) + 3 * integers(6, 128) + INNER * 5 / 8,
}


@pytest.mark.parametrize("preset", BLOCK)
def test_a_frozen_block(preset: str) -> None:
    assert per_block(ActivationsConfig(preset=preset)) == pytest.approx(BLOCK[preset], rel=1e-6)


def test_a_checkpoint_keeps_the_input_as_it_is() -> None:
    config = ActivationsConfig(operations={"block": "recompute"})
    assert per_block(config) == pytest.approx(4 * WIDTH, rel=1e-6)


def test_a_trained_layer_adds_its_input() -> None:
    """Those of the output projections of attention and of the feed-forward part, which is wider than its output."""
    frozen, trained = (
        per_block(ActivationsConfig(preset="balanced"), name) for name in (None, ".output.dense.weight")
    )
    inputs = integers(6, 64, INNER) + integers(8, 64)
    assert trained - frozen == pytest.approx(inputs, rel=1e-6)


def test_presets_keep_less_than_autograd() -> None:
    exact = per_block(ActivationsConfig())
    sizes = [per_block(ActivationsConfig(preset=name)) for name in ("paper", "balanced", "minimal", "ultra")]
    assert [exact, *sizes] == sorted([exact, *sizes], reverse=True)
    assert exact > 6 * BLOCK["balanced"]
