"""The proof on the first batch: what is wrong falls back with a line, what is right does not change by a bit."""

from __future__ import annotations

import copy
import functools
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tiny_models import batch_for, build, gradients, relative_error, without_dropout
from torch import Tensor, nn
from torch.nn import functional as F

import slimfit_ds
from slimfit_ds.activations import hf_attention, replay
from slimfit_ds.activations.checkpoint import checkpoint
from slimfit_ds.activations.codecs.channels import StandardisedChannels
from slimfit_ds.activations.config import PRESETS
from slimfit_ds.activations.twin import Outcome, difference
from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.split import Split, SplitModule

NOTHING_FROZEN = {"policy": "none"}


def slim(model: nn.Module, activations: Any, freeze: Any = None, **changes: Any):
    block = activations if isinstance(activations, dict) else {"preset": activations}
    return slimfit_ds.slim(model, {"freeze": freeze or NOTHING_FROZEN, "activations": {**block, **changes}})


def checks(handle: Any) -> set[tuple[str, str]]:
    return {(f.check, f.remedy) for f in handle.proof.failures}


# ---------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    ("name", "preset"),
    [*(("bert", preset) for preset in PRESETS), ("llama", "balanced"), ("t5", "minimal"), ("vit", "ultra")],
)
def test_where_all_is_right_not_a_bit_of_the_run_changes(name, preset):
    """Dropout is on, the batch is cut into chunks, and weights train in turn or by columns."""
    runs = []
    freeze = {"policy": "ils", "rate": 0.5} if preset == "ultra" else {"rate": 0.5}
    for proof in (False, True):
        model = build(name)
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        handle = slim(model, preset, freeze, proof=proof, chunk_tokens=20)
        optimizer = torch.optim.AdamW(handle.trainable.values(), lr=1e-3)
        handle.follow(optimizer)
        torch.manual_seed(5)
        losses = []
        for step in range(3):
            loss = model(**batch_for(name, seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        if proof:
            assert handle.proof.failures == []
            assert hooks == sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        handle.remove()
        assert not [key for m in model.modules() for key in m.__dict__ if "slimfit" in key]
        runs.append([*losses, torch.rand(3), *model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: _saved(m)])
def test_a_model_that_waits_for_its_proof_can_be_copied(copied):
    model = build("bert")
    handle = slim(model, "exact", {"rate": 0.5})
    other = copied(model)
    found = [gradients(each, batch_for("bert")) for each in (other, model)]
    assert torch.equal(found[0][0], found[1][0])
    assert handle.proof.failures == []


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def hook_around_the_call(block: nn.Module) -> None:
    """Give a block the checkpoint hook of transformers 5.17, which lies around the hooks of the block."""
    plain = type(block).forward
    plain = getattr(plain, "__wrapped__", plain)

    def call(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            inner = functools.partial(nn.Module.__call__, self, **kwargs)
            return self._gradient_checkpointing_func(inner, *args)
        return nn.Module.__call__(self, *args, **kwargs)

    old = type(type(block).__name__, (type(block),), {})
    # Afterwards: what a class is made with is wrapped anew.
    old.forward, old.__call__ = plain, call
    block.__class__ = old


@pytest.mark.parametrize("older", [False, True])
def test_parts_are_proven_when_they_first_run_in_training(older):
    model = without_dropout(build("bert"))
    if older:
        for block in model.bert.encoder.layer:
            hook_around_the_call(block)
    handle = slim(model, "minimal")
    waiting = len(handle.proof._handles)
    with torch.no_grad():
        model(**batch_for("bert"))
    model.eval()(**batch_for("bert"))
    assert len(handle.proof._handles) == waiting > 0
    model.train()(**batch_for("bert"))
    assert not handle.proof._handles


def test_hooks_of_users_do_not_see_the_proof():
    model = build("bert")
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
        if isinstance(module, nn.LayerNorm):
            module.register_full_backward_hook(lambda *_, name=name: calls.append(name))
    seen = []
    for proof in (False, True):
        calls.clear()
        handle = slim(model, "balanced", proof=proof)
        model(**batch_for("bert")).loss.backward()
        handle.remove()
        seen.append([*calls])
    assert seen[0] == seen[1]


def test_dropout_with_masks_of_its_own_is_proven_with_those_of_torch(monkeypatch):
    """As on a GPU, where the kernel of `philox` draws others."""

    def other_mask(values: Tensor, p: float, seed: int, first: int) -> Tensor:
        random = torch.Generator().manual_seed(first)
        return values * (torch.rand(values.shape, generator=random) >= p) / (1 - p)

    for name, stand_in in (("has_fused_kernels", lambda x: True), ("backend_of", lambda x: "none")):
        monkeypatch.setattr(f"slimfit_ds.activations.ops.dropout.{name}", stand_in)
    monkeypatch.setattr("slimfit_ds.activations.ops.dropout._masked", other_mask)
    model = build("bert")
    handle = slim(model, "balanced")
    model(**batch_for("bert"))
    assert handle.proof.failures == []


# ---------------------------------------------------------------- what is wrong in a model


class _Sequence(nn.Module):
    """`nn.TransformerEncoder` with its own layout [tokens, batch, width]: rows of its first dimension attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x).square().mean()


class _Block(nn.Module):
    def __init__(self, between: nn.Module):
        super().__init__()
        self.up, self.between, self.down = nn.Linear(8, 16), between, nn.Linear(16, 8)

    def forward(self, x: Tensor, cache: list | None = None) -> Tensor:
        if cache is not None:
            cache.append(x.detach())
            x = x + sum(cache) / len(cache)
        return x + self.down(self.between(self.up(x)).tanh())


class _Blocks(nn.Module):
    """Two blocks with something between their layers; `cache` is handed to the blocks, which write into it."""

    def __init__(self, between: Callable[[], nn.Module] = nn.Identity, cache: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(_Block(between()) for _ in range(2))
        self.cache = cache

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, _Cache()) if self.cache else layer(x)
        return x.square().mean()


class _Cache:
    """As models have it: an object that remembers tensors."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def append(self, tensor: Tensor) -> None:
        self.kept.append(tensor)

    def __iter__(self):
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


class _Normed(nn.Module):
    """BatchNorm over the features of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class _Counting(nn.Module):
    """Counts its calls in a buffer, past autograd's versions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.data.add_(1)
        return x


class _Positioned(nn.Module):
    """Blocks with a bias of [batch * heads] rows, as BLOOM's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_BiasedBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.ones(x.shape[0] * 2, 1, 8)
        for layer in self.layers:
            x = layer(x, bias)
        return x.square().mean()


class _BiasedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.second((self.first(x).repeat_interleave(2, 0) + bias)[::2])


class _ReadDirectly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_ReadBlock() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class _ReadBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(self.called(x).tanh(), self.read.weight, self.read.bias)


def _loss_and_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(x)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _even_row(x: Tensor) -> Tensor:
    """Make the first token of each sample [batch, tokens, width] nearly constant."""
    even = torch.zeros_like(x)
    even[:, 0] = 1e4
    return x + even


class _PreNorm(nn.Module):
    """A class token whose entries are nearly alike goes through a norm, which takes their mean away."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            32, 2, 64, dropout=0.0, batch_first=True, norm_first=True, layer_norm_eps=1e-12
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(_even_row(x)).pow(3).mean()


# A model, a batch, and what the proof finds in `minimal`.
FAULTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[tuple[str, str]]]] = {
    # Chunks of ten tokens, of which a rounded ReLU input near zero may be much.
    "tokens first": (
        _Sequence,
        (24, 4, 16),
        {("rows", "not cut into chunks"), ("gradient", "its input is kept exactly")},
    ),
    "batch norm": (lambda: _Blocks(_Normed), (6, 5, 8), {("rows", "not cut into chunks")}),
    "counter": (lambda: _Blocks(_Counting), (6, 5, 8), {("buffers", "left exact")}),
    "cache": (lambda: _Blocks(cache=True), (6, 5, 8), {("caches", "left exact"), ("gradient", "left exact")}),
    "batch times heads": (_Positioned, (6, 5, 8), {("rows", "not cut into chunks")}),
    "rows of even entries": (_PreNorm, (6, 5, 32), {("gradient", "its input is kept exactly")}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_model_fall_back_with_a_line(fault, caplog):
    build_model, shape, expected = FAULTS[fault]
    torch.manual_seed(0)
    model, x = without_dropout(build_model().train()), torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    loss, grads = _loss_and_gradients(model, x)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    handle = slim(model, "minimal", chunk_tokens=10)
    with caplog.at_level(logging.WARNING):
        found_loss, found = _loss_and_gradients(model, x)
    assert checks(handle)
    assert checks(handle) <= expected
    assert {f.module for f in handle.proof.failures} <= {n for n, _ in model.named_modules()}
    assert all(f"proof on the first batch: {f}" in caplog.text for f in handle.proof.failures)
    torch.testing.assert_close(found_loss, loss)
    assert relative_error(found, grads) < 0.03
    assert all(torch.equal(model.state_dict()[n], v) for n, v in after.items())
    handle.remove()
    assert not [key for m in model.modules() for key in m.__dict__ if "slimfit" in key]


def test_one_row_that_is_off_is_found_where_the_whole_is_within_the_limit():
    """A loss may depend on one token alone, as on a class token; a row with next to no gradient is no such token."""
    x = torch.ones(4, 64, 8)
    off, quiet, quiet_off = x.clone(), x.clone(), x.clone()
    off[2, 5] *= 1.5
    quiet[2, 5], quiet_off[2, 5] = 1e-3, 2e-3

    def found(plain: Tensor, ours: Tensor, rows: bool) -> tuple[str, str] | None:
        outcomes = [Outcome([], [g], {}, {}, [], 0) for g in (plain, ours)]
        return difference(*outcomes, exact=1e-5, limit=0.06, rows=rows)

    assert found(x, off, rows=False) is None
    assert found(x, off, rows=True) == ("gradient", "of one row of its input differs by 0.5, at most 0.12")
    assert found(quiet, quiet_off, rows=True) is None


@pytest.mark.parametrize("size", [0.0, 1e-7])
def test_rows_near_zero_in_front_of_a_norm_need_no_proof(size):
    """Class tokens of zeros, and padding whose vector nothing has trained."""
    torch.manual_seed(0)
    model, x = without_dropout(_PreNorm().train()), torch.randn(6, 5, 32)
    model.forward = lambda x: model.encoder(x).pow(3).mean()  # type: ignore[method-assign]
    x[:, 0] *= size
    loss, grads = _loss_and_gradients(model, x)
    slim(model, "minimal", proof=False)
    found_loss, found = _loss_and_gradients(model, x)
    torch.testing.assert_close(found_loss, loss)
    assert relative_error(found, grads) < 0.03


def test_without_the_proof_the_faults_come_back():
    """So it is the proof that catches them: all of the list, counted."""
    wrong = 0
    for build_model, shape, _ in FAULTS.values():
        torch.manual_seed(0)
        model, x = without_dropout(build_model().train()), torch.randn(shape)
        before = copy.deepcopy(model.state_dict())
        loss, grads = _loss_and_gradients(model, x)
        after = copy.deepcopy(model.state_dict())
        model.load_state_dict(before)
        slim(model, "minimal", chunk_tokens=10, proof=False)
        try:
            found_loss, found = _loss_and_gradients(model, x)
        except RuntimeError:
            wrong += 1
            continue
        right = torch.allclose(found_loss, loss) and relative_error(found, grads) < 0.03
        wrong += not (right and all(torch.equal(model.state_dict()[n], v) for n, v in after.items()))
    assert wrong == len(FAULTS)


def test_a_weight_that_trains_and_gets_no_gradient_is_named(monkeypatch):
    """A split layer of which the model reads the weight itself, where that reading leads nowhere."""
    monkeypatch.setattr(SplitModule, "weight", property(lambda layer: layer.frozen_weight))
    torch.manual_seed(0)
    model = _ReadDirectly().train()
    handle = slim(model, "exact", {"rate": 0.5})
    model(torch.randn(2, 3, 32)).backward()
    assert {(f.module, f.check) for f in handle.proof.failures} == {
        ("layers.0", "read"),
        ("layers.1", "read"),
    }
    assert all(
        "read.weight_columns" in f.measured and "called" not in f.measured for f in handle.proof.failures
    )


def test_layers_that_get_no_gradient_are_named(caplog):
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x).square().mean()

    model = Unused()
    handle = slim(model, "exact")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.follow(optimizer)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(torch.randn(2, 8)).backward()
            optimizer.step()
    assert caplog.text.count("got no gradient in the first step: unused.weight") == 1


def test_strict_makes_it_an_error_before_the_first_step():
    torch.manual_seed(0)
    model = _Sequence().train()
    handle = slim(model, "minimal", chunk_tokens=10, strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.follow(optimizer)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(24, 4, 16)).backward()
    with pytest.raises(ConfigError, match=r"encoder\.layers\.0: rows") as error:
        optimizer.step()
    assert len(error.value.problems) == 2
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.distributed
def test_two_ranks_of_which_one_has_the_faulty_batch_do_alike(run_ranks):
    fine, faulty = run_ranks(Path(__file__).with_name("proof_worker.py"), ranks=2)
    assert fine["failures"] == 0
    assert faulty["failures"] > 0
    assert fine["before the step"] == ["as it was", "as it was"]
    assert {"codec": None} in faulty["kept"]
    assert fine["kept"] == faulty["kept"] == faulty["before the step"]


def test_the_verdict_is_the_same_on_every_rank():
    """A rank that found nothing does as the one that did; `combine` stands for the reduction over ranks."""
    torch.manual_seed(0)
    models = [_PreNorm().train() for _ in range(2)]
    handles = [slim(model, "minimal") for model in models]
    flags: list[Tensor] = []

    def first(mine: Tensor) -> Tensor:
        flags.append(mine)
        return mine

    batches = torch.randn(6, 5, 32), torch.randn(6, 5, 32)
    for model, handle, x, combine in zip(
        models, handles, batches, (first, lambda mine: mine + flags[0]), strict=True
    ):
        if combine is not first:
            model.forward = lambda x, m=model: m.encoder(x).pow(3).mean()  # type: ignore[method-assign]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle.follow(optimizer, combine)
        model(x).backward()
        optimizer.step()
    assert handles[0].proof.failures
    assert not handles[1].proof.failures
    kept = [[m.__dict__.get("_slimfit_changed") for m in model.encoder.layers] for model in models]
    assert kept[0] == kept[1]
    assert {"codec": None} in kept[0]


# ---------------------------------------------------------------- what could be wrong in this package


def _broken_codec(monkeypatch) -> None:
    decode = StandardisedChannels.decode
    monkeypatch.setattr(
        StandardisedChannels, "decode", lambda self, encoded: decode(self, encoded).roll(1, -1)
    )


def _broken_chunks(monkeypatch) -> None:
    slices = replay.Chunks.slice
    monkeypatch.setattr(
        replay.Chunks,
        "slice",
        lambda self, tensors, index: [
            t.roll(1, 0) if t.dim() > 2 and index else t for t in slices(self, tensors, index)
        ],
    )


def _broken_mask(monkeypatch) -> None:
    attention = hf_attention.recomputed_attention
    monkeypatch.setattr(
        hf_attention,
        "recomputed_attention",
        lambda function, q, k, v, mask, **kwargs: attention(function, q, k, v, None, **kwargs),
    )


def _broken_columns(monkeypatch) -> None:
    monkeypatch.setattr(Split, "of_rows", lambda self, x: x[..., : self.count])


def _broken_dropout(monkeypatch) -> None:
    monkeypatch.setattr(
        "slimfit_ds.activations.checkpoint.replay.consumed_since", lambda before, tensors: False
    )


@pytest.mark.parametrize(
    ("mutation", "preset", "check"),
    [
        (_broken_codec, "minimal", "gradient"),
        (_broken_chunks, "minimal", "rows"),
        (_broken_mask, "balanced", "forward"),
        (_broken_columns, "exact", "gradient"),
        (_broken_dropout, "minimal", "gradient"),
    ],
)
def test_each_mutation_of_the_package_is_caught(mutation, preset, check, monkeypatch):
    model = build("bert")
    handle = slim(model, preset, {"rate": 0.5} if mutation is _broken_columns else None, chunk_tokens=20)
    batch = batch_for("bert")
    with monkeypatch.context() as broken:
        mutation(broken)
        model(**batch).loss.backward()
    blocks = {f.module.split(".layer.")[1][0] for f in handle.proof.failures if ".layer." in f.module}
    assert blocks == {"0", "1"}
    assert check in {f.check for f in handle.proof.failures}


def test_what_is_right_beside_a_broken_part_stays_compressed(monkeypatch):
    model = without_dropout(build("bert"))
    batch = batch_for("bert")
    loss, expected = gradients(model, batch)
    handle = slim(model, "balanced")
    with monkeypatch.context() as broken:
        _broken_mask(broken)
        found_loss, found = gradients(model, batch)
    assert torch.equal(found_loss, loss)
    assert relative_error(found, expected) < 0.04
    assert {f.module.rpartition(".")[2] for f in handle.proof.failures} == {"self"}
    left = {row.module for row in handle.compression.report() if row.codec == "exact"}
    assert left >= {f.module for f in handle.proof.failures}


# ---------------------------------------------------------------- models of transformers with such faults


def test_group_norm_over_channels_is_no_layer_norm():
    model = hf.PoolFormerForImageClassification(
        hf.PoolFormerConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2],
            padding=[2, 1], drop_path_rate=0.0,
        )
    ).train()  # fmt: skip
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 0, 1])}
    loss, expected = gradients(model, batch)
    for preset in ("minimal", "balanced"):
        handle = slim(model, preset)
        found_loss, found = gradients(model, batch)
        assert handle.proof.failures == []
        handle.remove()
        torch.testing.assert_close(found_loss, loss)
        assert relative_error(found, expected) < 0.05


def test_a_cache_that_a_model_makes_in_training_is_written_once():
    config = hf.XLMConfig(
        vocab_size=99, emb_dim=32, n_layers=1, n_heads=2, dropout=0.0, attention_dropout=0.0
    )
    model = hf.XLMForSequenceClassification(config).train()
    batch = {"input_ids": torch.randint(5, 99, (2, 6)), "labels": torch.tensor([0, 1])}
    loss, expected = gradients(model, batch)
    handle = slim(model, "minimal")
    found_loss, found = gradients(model, batch)
    assert torch.equal(found_loss, loss)
    assert relative_error(found, expected) < 0.03
    assert {f.module for f in handle.proof.failures} == {"transformer.attentions.0"}


def test_a_class_token_of_zeros_keeps_its_gradient():
    config = hf.DeiTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=8, patch_size=4,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.DeiTForImageClassification(config).train()
    batch = {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.arange(4) % 3}
    _, expected = gradients(model, batch)
    slim(model, "minimal")
    assert relative_error(gradients(model, batch)[1], expected) < 0.03


@pytest.mark.parametrize("preset", ["balanced", "minimal"])
def test_left_padding_under_eager_attention_has_finite_gradients(preset):
    config = hf.Gemma2Config(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=64, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.Gemma2ForCausalLM(config).train()
    ids = torch.randint(3, 60, (3, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    _, expected = gradients(model, batch)
    slim(model, preset)
    assert relative_error(gradients(model, batch)[1], expected) < 0.1


def test_biases_of_batch_times_heads_rows_are_not_cut():
    config = hf.BloomConfig(
        vocab_size=60, hidden_size=16, n_layer=1, n_head=2, hidden_dropout=0.0, attention_dropout=0.0
    )
    model = hf.BloomForCausalLM(config).train()
    ids = torch.randint(3, 60, (6, 8))
    loss, expected = gradients(model, {"input_ids": ids, "labels": ids})
    handle = slim(model, "minimal", chunk_tokens=16)
    found_loss, found = gradients(model, {"input_ids": ids, "labels": ids})
    assert {(f.module, f.check) for f in handle.proof.failures} == {("transformer.h.0", "rows")}
    torch.testing.assert_close(found_loss, loss)
    assert relative_error(found, expected) < 0.03


@pytest.mark.parametrize("preset", ["balanced", "minimal"])
def test_blocks_with_norms_of_an_unknown_kind_train(preset):
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    torch.manual_seed(0)
    model = hf.ResNetForImageClassification(config).train()
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.arange(4) % 3}
    before = copy.deepcopy(model.state_dict())
    loss, expected = gradients(model, batch)
    after = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    slim(model, preset)
    found_loss, found = gradients(model, batch)
    torch.testing.assert_close(found_loss, loss)
    assert relative_error(found, expected) < 0.1
    assert all(torch.equal(model.state_dict()[n], v) for n, v in after.items())


def test_public_checkpoint_is_not_asked_to_prove_anything():
    """Whoever calls `checkpoint` with `chunk_tokens` says that rows are independent."""
    layer, x = nn.Linear(8, 8), torch.randn(6, 2, 8, requires_grad=True)
    checkpoint(layer, x, codec="exact", chunk_tokens=4).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(6, 2, 8) @ layer.weight)
