"""Blocks in tiles of the sequence against plain autograd: architectures, lengths, masks, documents packed in one row."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import DECODER, build, freeze_some, gradients, relative_error, without_dropout
from torch import nn

import slimfit_ds
from slimfit_ds.activations import replay, tile_proof
from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.checkpoint import SEAM
from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.activations.replay import plan_chunks
from slimfit_ds.activations.tiles import TilePass

WITHOUT_CODEC = {"preset": "exact", "operations": {"block": "recompute"}}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "gemma2":
        config = hf.Gemma2Config(**DECODER, head_dim=8, sliding_window=4, attn_implementation="eager")
        return hf.Gemma2ForCausalLM(config).train()
    if name == "gemma3":
        config = hf.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=4)
        return hf.Gemma3ForCausalLM(config).train()
    if name == "mixtral":
        config = hf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2)
        return hf.MixtralForCausalLM(config).train()
    return without_dropout(build(name))


def batch_of(
    name: str, tokens: int = 13, rows: int = 2, padding: str | None = None
) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(tokens)
    if name == "vit":
        return {
            "pixel_values": torch.randn(rows, 3, 16, 16, generator=random),
            "labels": torch.arange(rows) % 3,
        }
    ids = torch.randint(2, 60, (rows, tokens), generator=random)
    mask = torch.ones_like(ids)
    if padding:
        columns = slice(None, tokens // 3) if padding == "left" else slice(tokens - tokens // 3, None)
        mask[0, columns] = 0
    labels = torch.arange(rows) % 3 if name == "bert" else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def tiled(monkeypatch) -> list[int]:
    """The number of tiles of every backward pass of a block so far."""
    counts: list[int] = []
    backward = TilePass.backward

    def counting(self: TilePass, *args: Any) -> None:
        counts.append(len(self))
        backward(self, *args)

    monkeypatch.setattr(TilePass, "backward", counting)
    return counts


ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "mixtral", "gpt2", "bert", "vit"]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_plain_autograd(name, padding, tiled, monkeypatch):
    # With padding the attention runs by single heads of the keys, without it by all at once.
    monkeypatch.setattr(tile_proof, "HEAD_TOKENS", 1 if padding else 1 << 18)
    if name == "vit" and padding:
        pytest.skip("pixels are not padded")
    model = model_of(name)
    freeze_some(model)
    batch = batch_of(name, padding=padding)
    loss, expected = gradients(model, batch)
    handle = compress(model, ActivationsConfig(**WITHOUT_CODEC, chunk_tokens=5))
    for _ in range(2):
        found_loss, found = gradients(model, batch)
        torch.testing.assert_close(found_loss, loss)
        assert relative_error(found, expected) < 2e-6
    assert 4 * [3 if name != "vit" else 4] == tiled[-4:]
    seams = [m.__dict__[SEAM] for m in model.modules() if SEAM in m.__dict__]
    assert {seam.head_tokens for seam in seams} == {1 if padding else 1 << 18}
    handle.remove()
    assert not any(SEAM in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("tokens", [1, 2, 4, 5, 6, 11, 16])
def test_any_length_trains_in_tiles_of_at_most_so_many_tokens(tokens, tiled):
    model, batch = model_of("llama"), batch_of("llama", tokens, rows=1)
    batch["num_items_in_batch"] = tokens
    loss, expected = gradients(model, batch)
    compress(model, ActivationsConfig(**WITHOUT_CODEC, chunk_tokens=5))
    found_loss, found = gradients(model, batch)
    torch.testing.assert_close(found_loss, loss)
    if tokens > 1:
        assert relative_error(found, expected) < 2e-6
    assert set(tiled[2:]) == ({-(-tokens // 5)} if tokens > 5 else set())


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_as_many_samples_as_tokens_are_told_apart(rows, tiled):
    """A mask [8, 1, 8, 8] has samples in its first dimension, whatever the batch before it looked like."""
    model = model_of("llama")
    handle = compress(model, ActivationsConfig(**WITHOUT_CODEC, chunk_tokens=5))
    gradients(model, batch_of("llama", padding="left"))
    for tokens in (8, 16):
        batch = batch_of("llama", tokens, rows, padding="left")
        plain = model_of("llama")
        loss, expected = gradients(plain, batch)
        found_loss, found = gradients(model, batch)
        torch.testing.assert_close(found_loss, loss)
        assert relative_error(found, expected) < 2e-6
    handle.remove()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_packed_in_a_row_train_as_one_by_one(attention, tiled):
    lengths = [7, 1, 1, 4, 1, 6]
    model = model_of("llama")
    model.set_attn_implementation(attention)
    random = torch.Generator().manual_seed(3)
    documents = [torch.randint(2, 60, (1, n), generator=random) for n in lengths]
    compress(model, ActivationsConfig(**WITHOUT_CODEC, chunk_tokens=5))
    total = sum(n - 1 for n in lengths)
    losses, summed = [], {}
    for ids in documents:
        if ids.shape[1] == 1:
            continue
        loss, found = gradients(model, {"input_ids": ids, "labels": ids, "num_items_in_batch": total})
        losses.append(loss)
        summed = {n: g + summed.get(n, 0) for n, g in found.items()}
    tiled.clear()
    ids = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    batch = {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}
    loss, found = gradients(model, {**batch, "num_items_in_batch": total})
    torch.testing.assert_close(loss, sum(losses), rtol=1e-5, atol=1e-5)
    assert relative_error(found, summed) < 1e-5
    assert set(tiled[-2:]) == {4}


@pytest.mark.parametrize("preset", ["minimal", "ultra", "balanced"])
def test_tiles_change_nothing_of_what_a_preset_keeps(preset, tiled):
    """The same codecs with and without tiles: the same gradients, to rounding."""
    model, batch = model_of("llama"), batch_of("llama", rows=1)
    gradients_of = []
    for chunk in (None, 5):
        handle = compress(model, ActivationsConfig(preset=preset, chunk_tokens=chunk))
        gradients_of.append(gradients(model, batch)[1])
        handle.remove()
    assert relative_error(*gradients_of) < 2e-5
    # Two in the proof.
    assert set(tiled) == {2, 3}


def test_dropout_is_differentiated_as_drawn(tiled):
    """The derivative of the loss along the gradient, by a difference, with the same random numbers."""
    torch.manual_seed(0)
    model = build("bert").double()
    compress(model, ActivationsConfig(**WITHOUT_CODEC, chunk_tokens=5))
    batch = batch_of("bert")
    gradients(model, batch)
    _, found = gradients(model, batch)
    assert tiled[-1] == 3
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    direction = found["bert.encoder.layer.0.intermediate.dense.weight"]
    step, losses = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        losses.append(gradients(model, batch)[0])
        with torch.no_grad():
            weight -= sign * step * direction
    slope = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(slope, direction.square().sum(), rtol=1e-4, atol=0)


def test_a_block_that_learns_later_is_cut_later(tiled):
    """With nothing to differentiate in its first step, as the lower blocks of a schedule of whole layers."""
    model, batch = model_of("llama"), batch_of("llama")
    first = [*model.model.layers[0].parameters(), *model.model.embed_tokens.parameters()]
    for parameter in first:
        parameter.requires_grad_(False)
    compress(model, ActivationsConfig(**WITHOUT_CODEC, chunk_tokens=5, chunk_forward=True))
    gradients(model, batch)
    for parameter in first:
        parameter.requires_grad_(True)
    plain = model_of("llama")
    _, expected = gradients(plain, batch)
    tiled.clear()
    _, found = gradients(model, batch)
    assert relative_error(found, expected) < 2e-6
    assert [layer.__dict__[SEAM].verdict for layer in model.model.layers] == [True, True]
    assert tiled == 4 * [3]


class _Mixing(nn.Module):
    """Tokens meet in a convolution beside the attention."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


@pytest.mark.parametrize("proof", [True, False])
def test_a_block_whose_tokens_meet_elsewhere_is_not_cut(proof, tiled, caplog):
    model, batch = model_of("llama"), batch_of("llama", rows=1)
    model.model.layers[0].mlp.up_proj = _Mixing(model.model.layers[0].mlp.up_proj)
    _, expected = gradients(model, batch)
    settings = {**WITHOUT_CODEC, "chunk_tokens": 5, "proof": proof}
    with caplog.at_level(logging.WARNING):
        handle = slimfit_ds.slim(model, {"activations": settings, "freeze": {"rate": 0.0, "policy": "ils"}})
        _, found = gradients(model, batch)
    assert relative_error(found, expected) < 2e-6
    seams = [layer.__dict__[SEAM].verdict for layer in model.model.layers]
    assert seams == [False, True]
    assert "depend on each other" in caplog.text
    if proof:
        assert [(f.module, f.check) for f in handle.proof.failures] == [("model.layers.0", "tokens")]


@pytest.mark.parametrize("chunk_forward", [False, True])
def test_a_batch_that_is_not_like_the_first_one_is_not_cut(chunk_forward, tiled, caplog):
    """A bias of as many places as a tile has tokens: whose they are cannot be told, so the batch runs whole, in a line."""
    settings = {**WITHOUT_CODEC, "chunk_tokens": 5, "chunk_forward": chunk_forward}
    model, plain = _with_sinks(), _with_sinks()
    compress(model, ActivationsConfig(**settings))
    with caplog.at_level(logging.WARNING):
        for tokens in (13, 8, 9):
            loss, expected = gradients(plain, batch_of("llama", tokens))
            found_loss, found = gradients(model, batch_of("llama", tokens))
            torch.testing.assert_close(found_loss, loss)
            assert relative_error(found, expected) < 2e-6
            # Of the second batch it comes out when it is cut; of the third nothing is.
            assert tiled if tokens == 13 else tokens == 8 or not tiled
            tiled.clear()
    assert caplog.text.count("is not cut into tiles: tokens of the sequence have a mask") == 2


def _with_sinks() -> nn.Module:
    """Attention that is given `[heads]` numbers, made anew at every call; a tile of 8 tokens has 4 of its own, too."""
    model = model_of("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.register_buffer("sinks", torch.randn(4))

        def forward(*args: Any, own: nn.Module = attention, **kwargs: Any) -> Any:
            return type(own).forward(own, *args, sinks=own.sinks * 1.0, **kwargs)

        attention.forward = forward
    return model


def test_parameters_of_a_block_are_no_tokens(tiled):
    """GptOss gives its attention `sinks [heads]`, and a tile has as many tokens."""
    torch.manual_seed(0)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = hf.GptOssForCausalLM(
        hf.GptOssConfig(**DECODER, **experts, head_dim=8, attn_implementation="eager")
    ).train()
    assert model.model.layers[0].self_attn.sinks.shape == (4,)
    batches = [batch_of("llama", tokens) for tokens in (13, 8)]
    expected = [gradients(model, batch) for batch in batches]
    compress(model, ActivationsConfig(**WITHOUT_CODEC, chunk_tokens=5))
    for batch, (loss, exact) in zip(batches, expected, strict=True):
        found_loss, found = gradients(model, batch)
        torch.testing.assert_close(found_loss, loss)
        assert relative_error(found, exact) < 2e-6
    assert set(tiled) == {2, 3}
    assert {layer.__dict__[SEAM].head_tokens for layer in model.model.layers} == {None}


def test_what_leads_to_the_attention_alone_runs_once(monkeypatch):
    """Rows that each projection multiplies: in front of the attention once forward, twice again; behind it once and once."""
    model, batch = model_of("llama"), batch_of("llama", rows=1)
    compress(model, ActivationsConfig(**WITHOUT_CODEC, chunk_tokens=5))
    gradients(model, batch)
    rows: dict[str, int] = {}
    layer = model.model.layers[0]
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        module = layer.get_submodule(name)
        plain = type(module).forward

        def counted(x: torch.Tensor, module=module, plain=plain, name=name) -> torch.Tensor:
            rows[name] = rows.get(name, 0) + x.shape[1]
            return plain(module, x)

        module.forward = counted
    gradients(model, batch)
    assert rows == {"self_attn.q_proj": 3 * 13, "mlp.up_proj": 2 * 13}


def test_tiles_are_as_few_as_may_be_and_never_larger_than_a_chunk():
    for tokens in range(2, 40):
        hidden = torch.zeros(1, tokens, 3)
        plan = plan_chunks(
            [hidden, torch.zeros(1, tokens, 7), torch.zeros(1, 1, tokens, tokens)], 7, tiled=True
        )
        if tokens <= 7:
            assert plan.tiles is None
            continue
        lengths = [stop - start for start, stop in plan.tiles.bounds]
        assert sum(lengths) == tokens
        assert max(lengths) <= 7
        assert len(lengths) == -(-tokens // 7)
        assert set(lengths[:-1]) == {lengths[0]}
        assert plan.tiles.dims == (1, 1, None)


def test_the_first_tokens_of_arguments():
    mask = torch.arange(36.0).view(1, 1, 6, 6)
    assert torch.equal(replay.first_tokens(mask, 6, 2), mask[..., :2, :2])
    documents = torch.tensor([0, 1, 4, 6])
    assert replay.first_tokens(documents, 6, 2).tolist() == [0, 1, 2, 2]
    assert replay.first_tokens(torch.zeros(6, 5, 6), 6, 2).shape == (6, 5, 2)
