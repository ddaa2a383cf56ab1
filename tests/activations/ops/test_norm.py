"""Norm layers with stored x_hat against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm
from slimfit_ds.activations.storing import RECIPE, SHARED

B, S, H = 3, 5, 64


class GemmaNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(H) * 0.1)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + self.weight)


CASES = {
    "layer": (lambda: nn.LayerNorm(H), NormKind(True, 1e-5)),
    "layer without bias": (lambda: nn.LayerNorm(H, bias=False), NormKind(True, 1e-5)),
    "layer without affine": (lambda: nn.LayerNorm(H, elementwise_affine=False), NormKind(True, 1e-5)),
    "rms": (lambda: nn.RMSNorm(H, eps=1e-5), NormKind(False, 1e-5)),
    "gemma": (GemmaNorm, NormKind(False, 1e-5, offset=1.0)),
}


def module_and_input(case):
    torch.manual_seed(0)
    module = CASES[case][0]().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(B, S, H, dtype=torch.float64) * 3 + 1
    return module, CASES[case][1], x.requires_grad_()


def run(function, module, x):
    module.zero_grad()
    x.grad = None
    y = function(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in module.parameters())]


def compressed(module, kind, codec):
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    return lambda x: compressed_norm(module, x, weight, bias, kind, get_codec(codec))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_formulas_are_those_of_autograd(case, frozen):
    module, kind, x = module_and_input(case)
    if frozen and hasattr(module, "weight") and module.weight is not None:
        module.weight.requires_grad_(False)
    expected = run(module, module, x)
    found = run(compressed(module, kind, "exact"), module, x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("codec", "bound"), [("int8", 0.02), ("lm4", 0.35)])
def test_a_codec_changes_the_backward_pass_only(case, codec, bound):
    module, kind, x = module_and_input(case)
    expected = run(module, module, x)
    found = run(compressed(module, kind, codec), module, x)
    assert torch.equal(found[0], expected[0])
    for gradient, exact in zip(found[1], expected[1], strict=True):
        assert (gradient - exact).norm() < bound * exact.norm()
    assert not torch.equal(found[1][0], expected[1][0])


def test_bfloat16_gradients_keep_their_dtypes():
    module = nn.LayerNorm(H).bfloat16()
    x = torch.randn(B, S, H, dtype=torch.bfloat16, requires_grad=True)
    y, grads = run(compressed(module, NormKind(True, 1e-5), "int8"), module, x)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.bfloat16 for g in grads)


def test_the_output_can_be_made_again_from_what_is_stored():
    module, kind, x = module_and_input("layer")
    y = compressed_norm(module, x, module.weight, module.bias, kind, get_codec("int8"), recipe=True)
    payload = SHARED.find(y.detach().view(-1, H), RECIPE)
    assert payload is not None
    assert payload.decode().shape == (B * S, H)
    torch.testing.assert_close(payload.decode().view_as(y), y.detach(), rtol=0, atol=0.1)
    with torch.no_grad():
        y.detach().add_(1)
    assert SHARED.find(y.detach(), RECIPE) is None


def test_unbiased_rounding_gives_unbiased_gradients():
    """Averaged over draws, stochastic int4 comes much closer to the exact gradient than one draw."""
    module, kind, x = module_and_input("layer")
    expected = run(module, module, x)[1][1]
    draws = [
        run(
            lambda t: compressed_norm(
                module, t, module.weight, module.bias, kind, get_codec("int4", rounding="stochastic")
            ),
            module,
            x,
        )[1][1]
        for _ in range(200)
    ]
    stacked = torch.stack(draws)
    standard_error = stacked.std(0) / len(draws) ** 0.5
    assert ((stacked.mean(0) - expected).abs() < 5 * standard_error + 1e-9).all()
