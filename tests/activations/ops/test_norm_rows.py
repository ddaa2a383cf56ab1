"""A norm worked on some rows at a time: the same codes and the same dx, sums as plain autograd in float64 has them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slimfit_ds.activations import channels as _registers_codecs  # noqa: F401
from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.codecs import rows as row_parts
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm
from slimfit_ds.activations.storing import RECIPE, SHARED, SavedTensors

B, S, H = 7, 11, 128
CODECS = ["int8", "int6", "int5", "int4"]


def norm_and_input(centred, dtype):
    torch.manual_seed(0)
    module = nn.LayerNorm(H, dtype=dtype) if centred else nn.RMSNorm(H, eps=1e-5, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = (torch.randn(B, S, H) * 3 + 1).to(dtype)
    return module, NormKind(centred, 1e-5), x.requires_grad_()


def run(module, kind, x, codec, monkeypatch, rows):
    """Payload, result and gradients with so many rows at a time."""
    monkeypatch.setattr(row_parts, "_ELEMENTS", rows * H)
    kept = []
    add = SavedTensors.add_payload
    monkeypatch.setattr(SavedTensors, "add_payload", lambda self, p: (kept.append(p.encoded), add(self, p)))
    module.zero_grad()
    x.grad = None
    y = compressed_norm(module, x, module.weight, getattr(module, "bias", None), kind, get_codec(codec))
    y.backward(torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype))
    monkeypatch.setattr(SavedTensors, "add_payload", add)
    return kept[0], y.detach(), x.grad, [p.grad for p in module.parameters()]


@pytest.mark.parametrize("rows", [1, 8, 76])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_give_the_bits_of_the_whole(centred, codec, rows, dtype, monkeypatch):
    module, kind, x = norm_and_input(centred, dtype)
    whole, y, dx, sums = run(module, kind, x, codec, monkeypatch, B * S)
    parts, y_parts, dx_parts, sums_parts = run(module, kind, x, codec, monkeypatch, rows)
    assert (parts.shape, parts.dtype) == (whole.shape, whole.dtype)
    for found, expected in zip(parts.tensors, whole.tensors, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(y_parts, y)
    assert torch.equal(dx_parts, dx)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(sums_parts, sums, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("centred", [True, False])
def test_gradients_are_those_of_float64_autograd(centred, monkeypatch):
    module, kind, x = norm_and_input(centred, torch.float32)
    found = run(module, kind, x, "int8", monkeypatch, 8)
    exact, x64 = module.double(), x.detach().double().requires_grad_()
    exact.zero_grad()
    y = exact(x64)
    y.backward(torch.linspace(-1, 2, y.numel()).view_as(y).double())
    expected = [x64.grad, *(p.grad for p in exact.parameters())]
    for gradient, reference in zip([found[2], *found[3]], expected, strict=True):
        assert (gradient - reference).norm() < 0.01 * reference.norm()


@pytest.mark.parametrize("codec", ["topk10", "lm4_channel", {"name": "int4", "rounding": "stochastic"}])
def test_a_codec_that_looks_across_rows_gets_them_all(codec, monkeypatch):
    name, options = (codec, {}) if isinstance(codec, str) else (codec["name"], {"rounding": "stochastic"})
    seen = []
    made = get_codec(name, **options)
    encode = made.encode
    monkeypatch.setattr(row_parts, "_ELEMENTS", H)
    monkeypatch.setattr(made, "encode", lambda t: (seen.append(t.shape), encode(t))[1])
    module, kind, x = norm_and_input(True, torch.float32)
    compressed_norm(module, x, module.weight, module.bias, kind, made).sum().backward()
    assert seen == [x.shape]
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("codec", ["int8_channel", "int4_channel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_are_standardised_over_all_rows(codec, rows, dtype, monkeypatch):
    """Statistics are pooled over the parts; the codes follow them, so gradients agree closely, not to the bit."""
    module, kind, x = norm_and_input(True, dtype)
    whole, y, dx, sums = run(module, kind, x, codec, monkeypatch, B * S)
    parts, y_parts, dx_parts, sums_parts = run(module, kind, x, codec, monkeypatch, rows)
    assert torch.equal(y_parts, y)
    assert [t.shape for t in parts.tensors] == [t.shape for t in whole.tensors]
    x_hat = torch.nn.functional.layer_norm(x.detach().double(), (H,)).view(-1, H)
    torch.testing.assert_close(parts.tensors[-2].view(H).double(), x_hat.mean(0), rtol=1e-4, atol=1e-5)
    expected = x_hat.std(0, correction=0)
    torch.testing.assert_close(parts.tensors[-1].view(H).double(), expected, rtol=1e-4, atol=1e-5)
    step = 2.0 / (127 if "8" in codec else 7)
    for found, reference in zip([dx_parts, *sums_parts], [dx, *sums], strict=True):
        assert (found - reference).norm() < 0.1 * step * reference.norm() + 1e-2 * (dtype == torch.bfloat16)


@pytest.mark.parametrize("codec", ["int8", "int8_channel"])
def test_the_output_is_made_again_in_parts(codec, monkeypatch):
    module, kind, x = norm_and_input(True, torch.bfloat16)
    made = get_codec(codec)
    y = compressed_norm(module, x, module.weight, module.bias, kind, made, recipe=True)
    whole = SHARED.find(y.detach(), RECIPE).decode()
    monkeypatch.setattr(row_parts, "_ELEMENTS", 8 * H)
    parts = SHARED.find(y.detach(), RECIPE).decode()
    assert parts.dtype == y.dtype
    assert torch.equal(parts, whole)


def test_at_most_a_part_is_there_in_fp32():
    """The peak of forward and backward beside bf16 input, output and gradients is a few parts, not four fp32 copies."""
    from slimfit_ds.memory.tracker import MemoryTracker

    module = nn.LayerNorm(H, dtype=torch.bfloat16)
    rows = 8 * row_parts._ELEMENTS // H
    x = torch.zeros(rows, H, dtype=torch.bfloat16, requires_grad=True)
    with MemoryTracker(module) as tracker:
        y = compressed_norm(module, x, module.weight, module.bias, NormKind(True, 1e-5), get_codec("int8"))
        y.backward(torch.ones_like(y))
    elements = rows * H
    kept = elements + elements // 32  # codes and steps
    # x, y, dy and dx in bf16; x_hat, dy and dx of a part in fp32, and one to spare. At once it would be 12 * elements.
    assert tracker.report().peak < 8 * elements + kept + 4.5 * 4 * row_parts._ELEMENTS
