"""Norm layers with stored x_hat against plain autograd in float64, at once and some rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimfit_ds.activations.codecs import absmax, get_codec
from slimfit_ds.activations.ops import norm
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm
from slimfit_ds.activations.saved_tensors import SHARED, SavedTensors

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


def module_and_input(case, dtype=torch.float64):
    torch.manual_seed(0)
    module = CASES[case][0]().to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = (torch.randn(B, S, H) * 3 + 1).to(dtype)
    return module, CASES[case][1], x.requires_grad_()


def run(function, module, x):
    module.zero_grad()
    x.grad = None
    y = function(x)
    (y * torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)).sum().backward()
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
@pytest.mark.parametrize(("codec", "bound"), [("int8", 0.02), ("int4", 0.25), ("topk10", 1.0)])
def test_a_codec_changes_the_backward_pass_only(case, codec, bound):
    module, kind, x = module_and_input(case)
    expected = run(module, module, x)
    found = run(compressed(module, kind, codec), module, x)
    assert torch.equal(found[0], expected[0])
    for gradient, exact in zip(found[1], expected[1], strict=True):
        assert (gradient - exact).norm() < bound * exact.norm()
    assert not torch.equal(found[1][0], expected[1][0])


@pytest.mark.parametrize("case", CASES)
def test_a_large_input_goes_through_the_norm_in_parts(case, monkeypatch):
    module, kind, x = module_and_input(case)
    expected = run(compressed(module, kind, "exact"), module, x)
    monkeypatch.setattr(norm, "_ELEMENTS", 4 * H)
    sizes = []
    module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel() // H))
    found = run(compressed(module, kind, "exact"), module, x)
    assert sizes == [4, 4, 4, 3]
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_bfloat16_gradients_keep_their_dtypes():
    module, kind, x = module_and_input("layer", torch.bfloat16)
    y, grads = run(compressed(module, kind, "int8"), module, x)
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.bfloat16 for g in grads)


def test_a_transposed_input():
    module, kind, x = module_and_input("rms")
    turned = x.detach().transpose(0, 1).requires_grad_()
    expected = run(module, module, turned)
    found = run(compressed(module, kind, "exact"), module, turned)
    torch.testing.assert_close(found, expected)


def traced(module, kind, x, codec, monkeypatch, rows):
    """What is kept, result and gradients with so many rows at a time."""
    monkeypatch.setattr(absmax, "_PART", rows * H)
    kept = []
    add = SavedTensors.add_payload
    monkeypatch.setattr(SavedTensors, "add_payload", lambda self, p: (kept.append(p.encoded), add(self, p)))
    y, (dx, *sums) = run(compressed(module, kind, codec), module, x)
    monkeypatch.setattr(SavedTensors, "add_payload", add)
    return kept[0], y, dx, sums


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("codec", ["int8", "int6", "int4"])
@pytest.mark.parametrize("case", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_give_the_bits_of_the_whole(case, codec, rows, dtype, monkeypatch):
    module, kind, x = module_and_input(case, dtype)
    whole, y, dx, sums = traced(module, kind, x, codec, monkeypatch, B * S)
    parts, y_parts, dx_parts, sums_parts = traced(module, kind, x, codec, monkeypatch, rows)
    assert (parts.shape, parts.dtype) == (whole.shape, whole.dtype)
    assert all(torch.equal(a, b) for a, b in zip(parts.tensors, whole.tensors, strict=True))
    assert torch.equal(y_parts, y)
    assert torch.equal(dx_parts, dx)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(sums_parts, sums, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_are_standardised_over_all_rows(dtype, monkeypatch):
    """Statistics are pooled over the parts; the codes follow them, so gradients agree closely, not to the bit."""
    module, kind, x = module_and_input("layer", dtype)
    whole, y, dx, sums = traced(module, kind, x, "int8_channel", monkeypatch, B * S)
    parts, y_parts, dx_parts, sums_parts = traced(module, kind, x, "int8_channel", monkeypatch, 4)
    assert torch.equal(y_parts, y)
    assert [t.shape for t in parts.tensors] == [t.shape for t in whole.tensors]
    x_hat = torch.nn.functional.layer_norm(x.detach().double(), (H,)).view(-1, H)
    torch.testing.assert_close(parts.tensors[-2].view(H).double(), x_hat.mean(0), rtol=1e-4, atol=1e-5)
    deviation = x_hat.std(0, correction=0)
    torch.testing.assert_close(parts.tensors[-1].view(H).double(), deviation, rtol=1e-4, atol=1e-5)
    for found, reference in zip([dx_parts, *sums_parts], [dx, *sums], strict=True):
        assert (found - reference).norm() < 2e-3 * reference.norm() + 1e-2 * (dtype == torch.bfloat16)


@pytest.mark.parametrize("codec", ["int8", "int8_channel"])
def test_the_output_can_be_computed_again_from_what_is_stored(codec, monkeypatch):
    module, kind, x = module_and_input("layer", torch.float32)
    y = compressed_norm(module, x, module.weight, module.bias, kind, get_codec(codec), share=True)
    payload = SHARED.find_rebuilt(y.detach().view(-1, H))
    assert payload is not None
    whole = payload.decode()
    assert whole.shape == (B * S, H)
    torch.testing.assert_close(whole.view_as(y), y.detach(), rtol=0, atol=0.1)
    monkeypatch.setattr(absmax, "_PART", 4 * H)
    assert torch.equal(SHARED.find_rebuilt(y).decode().view_as(whole), whole)
    with torch.no_grad():
        y.detach().add_(1)
    assert SHARED.find_rebuilt(y) is None


def test_a_map_of_four_dimensions_has_no_heads():
    """ConvNext normalises [batch, height, width, hidden]; codecs know [batch, heads, tokens, width] by four dimensions."""
    module, kind, _ = module_and_input("layer", torch.float32)
    x = torch.randn(2, H, 3, 5).permute(0, 2, 3, 1).requires_grad_()
    y = compressed_norm(module, x, module.weight, module.bias, kind, get_codec("int8_channel"), share=True)
    torch.testing.assert_close(SHARED.find_rebuilt(y).decode(), y.detach(), rtol=0, atol=0.1)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    assert (dx - expected).norm() < 0.1 * expected.norm()


def test_at_most_a_part_is_there_in_fp32():
    """The peak of forward and backward beside bf16 input, output and gradients is a few parts, not four fp32 copies."""
    from slimfit_ds.memory.tracker import MemoryTracker

    module = nn.LayerNorm(H, dtype=torch.bfloat16)
    rows = 8 * absmax._PART // H
    x = torch.zeros(rows, H, dtype=torch.bfloat16, requires_grad=True)
    with MemoryTracker(module) as tracker:
        y = compressed_norm(module, x, module.weight, module.bias, NormKind(True, 1e-5), get_codec("int8"))
        y.backward(torch.ones_like(y))
    elements = rows * H
    kept = elements + elements // 32 + 4 * rows  # codes, steps and rstd
    # x, y, dy and dx in bf16; x_hat, dy and dx of a part in fp32, and one to spare. At once it would be 12 * elements.
    assert tracker.report().peak < 8 * elements + kept + 4.5 * 4 * absmax._PART
