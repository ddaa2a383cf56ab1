"""Dropout by replay and by packed mask against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.activations.ops.cpu_dropout import runs_in_c
from slimfit_ds.activations.ops.dropout import packed_dropout, replayed_dropout


def packed(layer, x, p):
    return packed_dropout(layer, x, p, get_codec("mask"))


@pytest.mark.parametrize("function", [replayed_dropout, packed])
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


def test_an_element_that_was_zero_still_has_a_gradient():
    x = torch.zeros(1000, 4, requires_grad=True)
    y = packed(nn.Dropout(0.5), x, 0.5)
    y.sum().backward()
    assert 0.4 < float((x.grad == 2).float().mean()) < 0.6


def test_what_is_kept():
    x = torch.randn(64, 64, requires_grad=True)
    for function, most in ((packed, 64 * 64 // 8), (replayed_dropout, torch.get_rng_state().numel())):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            function(nn.Dropout(0.2), x, 0.2)
        assert sum(t.numel() * t.element_size() for t in kept) == most


@pytest.mark.parametrize(("way", "most"), [("replay", 6000), ("philox", 6000), ("mask", 32 * 64 // 8)])
def test_the_setting_reaches_the_layers_of_a_model(way, most):
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.3), nn.Linear(64, 64)).train()
    x = torch.randn(32, 64)

    def step():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            torch.manual_seed(4)
            y = model[1](model[0](x))
        gradient = torch.autograd.grad(model[2](y).square().sum(), model[0].weight)[0]
        return gradient, sum(t.numel() * t.element_size() for t in kept)

    expected, plain = step()
    handle = compress(model, ActivationsConfig(operations={"dropout": way}))
    assert [row.codec for row in handle.report() if row.kind == "dropout"] == [way]
    found, kept = step()
    if way == "philox" and runs_in_c(x):
        # Masks of its own: the gradient is that of other elements, of the same size on average.
        assert 0.7 < found.norm() / expected.norm() < 1.4
    else:
        torch.testing.assert_close(found, expected)
    # Plain dropout keeps its mask; the first layer's input and weight stay.
    assert kept <= (32 * 64 + 64 * 64) * 4 + most
    if way == "mask":
        assert kept < plain
