"""What grows with the sequence: so much per token, the rest not at all."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from tiny_models import gradients

from slimfit_ds.activations import tile_proof
from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.memory.tracker import MemoryTracker

_WIDTH, _SHORT = 64, 256


def _peak(tokens: int, layers: int) -> int:
    """Return the peak of a step, in bytes; the host's memory is not in it."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": tokens}
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=_WIDTH, intermediate_size=3 * _WIDTH, num_hidden_layers=layers, **heads
    )
    model = hf.LlamaForCausalLM(config).train().requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    compress(model, ActivationsConfig(preset="minimal", offload=True, chunk_tokens=64, chunk_loss_tokens=64))
    ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    gradients(model, batch)
    with MemoryTracker(model) as tracker:
        model(**batch, use_cache=False).loss.backward()
    return tracker.report().peak


@pytest.mark.parametrize("layers", [2, 3])
def test_the_working_set_does_not_grow(layers, monkeypatch):
    monkeypatch.setattr(tile_proof, "HEAD_TOKENS", 1)
    peaks = [_peak(n * _SHORT, layers) for n in (1, 2, 4)]
    slope = (peaks[1] - peaks[0]) / _SHORT
    # Of the block's input and output the gradients; queries, keys, values; the attention's result and its gradient: 6 numbers for
    # each of the hidden state, keys and values having half as many heads. A group of heads takes its gradients and lets go of the rest.
    assert slope <= (6 + 0.5) * 4 * _WIDTH
    assert peaks[2] - peaks[1] == pytest.approx(2 * _SHORT * slope, rel=0.02)
    # Weights, and what a tile of 64 tokens and a chunk of the loss take.
    model = (layers * 13 + 2) * _WIDTH**2 * 4
    assert peaks[0] - slope * _SHORT <= model + 64 * 24 * _WIDTH * 4


def test_blocks_between_forward_and_backward_take_nothing():
    growth = [_peak(4 * _SHORT, layers) - _peak(_SHORT, layers) for layers in (2, 3)]
    assert growth[1] - growth[0] <= 0.01 * growth[0]
