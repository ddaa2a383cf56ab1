"""Blocks among other machinery: torch's checkpointing, trainers that toggle it, outputs taken out of a block."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from tiny_models import DECODER, batch_for, build, gradients, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import ActivationsConfig

MINIMAL = {"block": "recompute"}


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    balance = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**DECODER, **experts, **balance)).train()


@pytest.mark.parametrize(
    "config",
    [
        ActivationsConfig(operations=MINIMAL, chunk_tokens=10),
        ActivationsConfig(operations=MINIMAL, chunk_tokens=10, chunk_forward=True),
    ],
)
def test_router_logits_that_leave_a_block_keep_their_gradient(config):
    model, batch = mixtral(), batch_for("llama")
    loss, expected = gradients(model, batch)
    handle = compress(model, config)
    with pytest.warns(UserWarning, match="router_logits leave it while it runs"):
        found_loss, found = gradients(model, batch)
    handle.remove()
    torch.testing.assert_close(found_loss, loss)
    assert relative_error(found, expected) < 2e-6


def test_attentions_taken_out_of_recomputed_blocks_are_those_of_the_whole_batch():
    model, batch = build("llama"), batch_for("llama")
    model.set_attn_implementation("eager")
    expected = model(**batch, output_attentions=True).attentions
    handle = compress(model, ActivationsConfig(operations=MINIMAL, chunk_tokens=10, chunk_forward=True))
    with pytest.warns(UserWarning, match="attentions leave it while it runs"):
        found = model(**batch, output_attentions=True).attentions
    handle.remove()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_loss_of_what_a_users_hook_took_out_of_a_block_is_a_clear_error():
    model, batch = build("llama"), batch_for("llama")
    handle = compress(model, ActivationsConfig(preset="minimal"))
    taken: list[torch.Tensor] = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: taken.append(output))
    model(**batch)
    with pytest.raises(RuntimeError, match="left a recomputed part of the model other than by its result"):
        taken[0].sum().backward()
    handle.remove()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("preset", ["balanced", "minimal"])
def test_checkpointing_that_a_trainer_switches_off_and_on_leaves_ours_in_place(preset):
    model, batch = build("llama"), batch_for("llama")
    untouched = copy.deepcopy(model)
    compress(untouched, ActivationsConfig(preset=preset))
    _, expected = gradients(untouched, batch)
    handle = compress(model, ActivationsConfig(preset=preset))
    # What TRL's disable_gradient_checkpointing does around the pass of a reference model.
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = gradients(model, batch)
    assert relative_error(found, expected) == 0
    handle.remove()
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


class Checkpointed(nn.Module):
    """A block that runs through torch's own checkpointing."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


@pytest.mark.parametrize("preset", ["paper", "balanced", "minimal", "ultra"])
def test_inside_of_torchs_checkpointing_nothing_is_compressed(preset):
    """A model or trainer that checkpoints by itself has what it wants: its blocks are exact, the rest is compressed."""
    batch = batch_for("llama")
    plain, own = build("llama"), build("llama")
    own.config.use_cache = False
    _, expected = gradients(plain, batch)
    for index, layer in enumerate(own.model.layers):
        compress(layer, ActivationsConfig(preset=preset))
        own.model.layers[index] = Checkpointed(layer)
    _, found = gradients(own, batch)
    assert relative_error({n.replace(".block.", "."): g for n, g in found.items()}, expected) < 2e-6


def test_a_norm_may_be_recomputed_by_torchs_checkpointing():
    """Whose hooks are hidden behind others here."""
    from slimfit_ds.activations.codecs import resolve_codec
    from slimfit_ds.activations.ops.norm import NormKind, compressed_norm

    norm, kind = nn.LayerNorm(16), NormKind(True, 1e-5)
    x = torch.randn(4, 16, requires_grad=True)
    y = checkpoint(
        lambda t: (
            compressed_norm(norm, t, norm.weight, norm.bias, kind, resolve_codec("int8")).square().sum()
        ),
        x,
        use_reentrant=False,
    )
    y.backward()
    expected = torch.autograd.grad(norm(x).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=0.05, atol=0.05)


class EditsInPlace(nn.Module):
    """Blocks that change a tensor of theirs, their input or their result in place."""

    class Block(nn.Module):
        def __init__(self, edited: str):
            super().__init__()
            self.edited = edited
            self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
            self.act = nn.SiLU(inplace=edited == "activation")

        def forward(self, x):
            if self.edited == "input":
                x += 0.1
            y = self.norm(x)
            if self.edited == "norm":
                y *= 0.5
            y = self.act(self.up(y))
            if self.edited == "middle":
                y[:, 0] = 0
            return x + self.down(y)

    def __init__(self, edited: str):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(32, 32)
        self.blocks = nn.ModuleList(self.Block(edited) for _ in range(2))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
            if block.edited == "result":
                x *= 0.9
        return x.square().mean()


@pytest.mark.parametrize("preset", ["paper", "balanced", "minimal"])
@pytest.mark.parametrize("edited", ["input", "norm", "activation", "middle", "result"])
def test_what_is_changed_in_place_gives_the_gradients_of_plain_autograd(edited, preset):
    plain, model, x = EditsInPlace(edited), EditsInPlace(edited), torch.randn(4, 8, 32)
    for each in (plain, model):
        # Nothing before the first block trains: autograd would not mind if its input changed.
        each.embed.requires_grad_(False)
    plain(x).backward()
    compress(model, ActivationsConfig(preset=preset, chunk_tokens=16))
    if (edited, preset) == ("input", "minimal"):
        with pytest.warns(UserWarning, match="Block changes its input in place.*: it is left exact"):
            model(x).backward()
    else:
        model(x).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    found = {n: model.get_parameter(n).grad for n in expected}
    assert relative_error(found, expected) < {"paper": 0.1, "balanced": 0.03, "minimal": 0.01}[preset]


def test_a_bias_that_is_learned_and_passed_as_the_mask_keeps_its_gradient():
    """Also where the softmax is stored: BEiT's table of relative positions reaches attention as its mask."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = hf.BeitForImageClassification(
        hf.BeitConfig(**sizes, image_size=16, patch_size=4, num_labels=3, use_relative_position_bias=True)
    ).train()
    # Rows of zeros in front of a norm are another matter.
    nn.init.normal_(model.beit.embeddings.cls_token)
    batch = batch_for("vit")
    _, expected = gradients(model, batch)
    tables = [name for name in expected if "relative_position_bias_table" in name]
    assert tables
    for preset in ("paper", "balanced", "minimal"):
        handle = compress(model, ActivationsConfig(preset=preset))
        _, found = gradients(model, batch)
        handle.remove()
        for name in tables:
            assert relative_error({name: found[name]}, {name: expected[name]}) < 0.3, (preset, name)
