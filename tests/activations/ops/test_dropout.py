"""Dropout by replay against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.activations.ops.dropout import philox_dropout, replayed_dropout
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm
from slimfit_ds.activations.saved_tensors import SHARED


@pytest.mark.parametrize("function", [replayed_dropout, philox_dropout])
@pytest.mark.parametrize("p", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_same_values_and_gradients_as_pytorch(function, p, layout):
    base = torch.randn(6, 10, 8, dtype=torch.float64)
    x = {"contiguous": base, "transposed": base.transpose(0, 1), "strided": base[:, ::2]}[layout].detach()
    x = x.requires_grad_()
    layer = nn.Dropout(p)
    upstream = torch.randn(x.shape, dtype=x.dtype)
    results = []
    for method in (lambda t: layer(t), lambda t: function(layer, t, p)):
        torch.manual_seed(3)
        y = method(x)
        torch.rand(5)  # the generator moves on before the backward pass
        results.append((y.detach(), *torch.autograd.grad((y * upstream).sum(), x), torch.get_rng_state()))
    torch.testing.assert_close(results[1], results[0])


def test_what_is_kept():
    x = torch.randn(64, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        replayed_dropout(nn.Dropout(0.2), x, 0.2)
    assert [t.numel() for t in kept] == [torch.get_rng_state().numel()]


def test_the_output_can_be_computed_again_from_a_stored_norm():
    layer = nn.LayerNorm(64)
    x = torch.randn(10, 64, requires_grad=True)
    kind = NormKind(True, 1e-5)
    y = compressed_norm(layer, x, layer.weight, layer.bias, kind, get_codec("int8"), share=True)
    z = replayed_dropout(nn.Dropout(0.3), y, 0.3)
    again = SHARED.find_rebuilt(z).decode()
    assert (again[z == 0] == 0).all()
    torch.testing.assert_close(again, z.detach(), rtol=0, atol=0.1)


@pytest.mark.parametrize("way", ["replay", "philox"])
def test_the_setting_reaches_the_layers_of_a_model(way):
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.3), nn.Linear(64, 64)).train()
    x = torch.randn(32, 64)

    def step():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            torch.manual_seed(4)
            y = model[1](model[0](x))
        gradient = torch.autograd.grad(model[2](y).square().sum(), model[0].weight)[0]
        return gradient, [t.dtype for t in kept]

    expected, plain = step()
    handle = compress(model, ActivationsConfig(operations={"dropout": way}))
    assert [row.codec for row in handle.report() if row.kind == "dropout"] == [way]
    found, kept = step()
    torch.testing.assert_close(found, expected)
    # A random state instead of the mask.
    assert torch.uint8 not in plain
    assert torch.uint8 in kept
    assert len(kept) == len(plain)
