"""`compress` on whole models: recognition, restoration, and training through the presets."""

from __future__ import annotations

import pytest
import torch
from tiny_models import BUILDERS, batch_for, build, freeze_some, gradients, relative_error, without_dropout
from torch import nn

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import PRESETS, ActivationsConfig


def snapshot(model: nn.Module) -> list:
    """Everything that must be as before after `remove`."""
    modules = [
        (name, id(module), type(module), dict(module.__dict__)) for name, module in model.named_modules()
    ]
    hooks = [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m._backward_hooks)) for m in model.modules()
    ]
    implementations = [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")]
    return [modules, hooks, implementations]


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_remove_restores_the_model(name, preset):
    model = build(name)
    keys, before = list(model.state_dict()), snapshot(model)
    handle = compress(model, ActivationsConfig(preset=preset))
    assert list(model.state_dict()) == keys
    handle.remove()
    assert snapshot(model) == before
    handle.remove()


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_exact_block_checkpoints_give_the_gradients_of_plain_autograd(name):
    model = without_dropout(build(name))
    freeze_some(model)
    batch = batch_for(name)
    loss, expected = gradients(model, batch)
    handle = compress(model, ActivationsConfig(operations={"block": "recompute"}, chunk_tokens=20))
    found_loss, found = gradients(model, batch)
    handle.remove()
    assert torch.equal(found_loss, loss)
    assert relative_error(found, expected) < 2e-6


@pytest.mark.parametrize("preset", sorted(PRESETS))
@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_forward_is_identical_and_gradients_are_close(name, preset):
    model = without_dropout(build(name))
    active = freeze_some(model)
    batch = batch_for(name)
    loss, expected = gradients(model, batch)
    handle = compress(model, ActivationsConfig(preset=preset))
    found_loss, found = gradients(model, batch)
    handle.remove()
    assert torch.equal(found_loss, loss)
    assert set(found) == set(expected) <= set(active)
    print(name, preset, relative_error(found, expected))
    assert all(torch.isfinite(g).all() for g in found.values())
