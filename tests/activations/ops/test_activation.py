"""Activation functions with stored derivative or input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.ops.activation import compressed_activation
from slimfit_ds.activations.saved_tensors import SHARED

FUNCTIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_exact_input_gives_the_exact_gradient(name):
    x = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    function = FUNCTIONS[name]
    y = compressed_activation(function, x, get_codec("exact"))
    assert torch.equal(y, function(x))
    weights = torch.randn_like(x)
    (found,) = torch.autograd.grad((y * weights).sum(), x)
    (expected,) = torch.autograd.grad((function(x) * weights).sum(), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("name", "bits", "bound"), [("gelu", 4, 0.06), ("silu", 4, 0.06), ("relu", 1, 1e-6)])
def test_step_derivative(name, bits, bound):
    x = torch.randn(64, 64, requires_grad=True)
    function = FUNCTIONS[name]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = compressed_activation(function, x, get_codec(f"step{bits}", activation=name))
    assert torch.equal(y, function(x))
    assert sum(t.numel() * t.element_size() for t in kept) == x.numel() * bits // 8
    weights = torch.randn_like(x)
    (found,) = torch.autograd.grad((y * weights).sum(), x)
    (expected,) = torch.autograd.grad((function(x) * weights).sum(), x)
    assert (found - expected).norm() <= bound * expected.norm()


def test_the_output_can_be_made_again_from_the_stored_input():
    x = torch.randn(8, 64, requires_grad=True)
    y = compressed_activation(F.silu, x, get_codec("int8"), share=True)
    payload = SHARED.find_rebuilt(y)
    torch.testing.assert_close(payload.decode(), y.detach(), rtol=0, atol=0.05)
