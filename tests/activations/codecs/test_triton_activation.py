"""The activation kernels: values against float64, codes and gradients against the torch path."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton_cases import DEVICE, FLOATS, MARKS, SIZES, same, sample

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.ops import activation, fused_activation

pytest.importorskip("triton")

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")]
EXACT = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}
# A rounding of the result, and a few of what precedes it.
ULP = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
STEPS = [
    {"name": f"step{bits}", "activation": name, **({"scale": 2.0} if bits == 5 else {})}
    for bits in (5, 4, 2, 1)
    for name in ("gelu", "silu", "relu")
]
INTEGERS = [{"name": "int4"}, {"name": "int8"}, {"name": "int6", "group": 128}, {"name": "int5"}]


class NewGELU(nn.Module):
    """The tanh form in single operations, each rounded to the dtype, as GPT-2 computes it."""

    def forward(self, x):
        cube = torch.pow(x, 3.0)
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * cube)))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def test_every_function_has_forms_and_a_slope():
    from slimfit_ds.activations.ops.triton_elementwise import FORMS, SLOPES

    assert set(FORMS) == set(SLOPES) == fused_activation.KNOWN == set(EXACT)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EXACT)
def test_values_and_slopes(name, dtype):
    """Where the result is not the difference of two numbers that nearly agree."""
    from slimfit_ds.activations.ops.triton_activation import apply, integer_gradient
    from slimfit_ds.activations.ops.triton_elementwise import FORMS, SLOPES

    x = torch.linspace(-3, 8, 4999).to(dtype).to(DEVICE)
    exact = EXACT[name](x.double())
    for form in FORMS[name]:
        y = torch.empty_like(x)
        apply(x, y, form)
        # The form in single operations rounds each of seven to the dtype.
        roundings = 8 if form.__name__.endswith("unfused") else 1
        tolerance = roundings * ULP[dtype]
        torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance / 4)

    codec = get_codec("int8", group=64)
    encoded = codec.encode(x)
    stored = codec.decode(encoded)
    dy, dx = torch.linspace(-1, 2, len(x)).to(x), torch.empty_like(x)
    integer_gradient(dy, encoded.tensors, dx, codec, SLOPES[name])
    at = stored.double().requires_grad_()
    (expected,) = torch.autograd.grad(EXACT[name](at), at, dy.double())
    torch.testing.assert_close(dx.double(), expected, rtol=4 * ULP[dtype], atol=ULP[dtype])


@pytest.mark.parametrize("name", EXACT)
def test_extreme_inputs(name):
    from slimfit_ds.activations.ops.triton_activation import apply
    from slimfit_ds.activations.ops.triton_elementwise import FORMS

    x = torch.tensor([0.0, -0.0, 60.0, -60.0, 1e4, -1e4, torch.nan], device=DEVICE)
    for form in FORMS[name]:
        y = torch.empty_like(x)
        apply(x, y, form)
        torch.testing.assert_close(y, EXACT[name](x), equal_nan=True)


@pytest.mark.parametrize("spec", [*STEPS, *INTEGERS], ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", FLOATS)
def test_forward_stores_what_the_codec_stores(spec, dtype):
    from slimfit_ds.activations.ops.triton_activation import apply
    from slimfit_ds.activations.ops.triton_elementwise import FORMS

    codec = get_codec(**spec)
    name = spec.get("activation", "silu")
    for numel in SIZES:
        x = sample(numel, dtype, finite=True).to(DEVICE)
        kernels = fused_activation.ActivationKernels(
            fused_activation.PACKINGS[type(codec)](codec), codec, name
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fused_activation, "_form_of", lambda *_, name=name: FORMS[name][0])
            y, encoded = kernels.forward(EXACT[name], x)
        alone = torch.empty_like(x)
        apply(x, alone, FORMS[name][0])
        assert same(y, alone)
        for ours, theirs in zip(encoded.tensors, codec.encode(x).tensors, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("spec", STEPS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gradient_of_a_stored_derivative_is_that_of_torch(spec, dtype):
    from slimfit_ds.activations.ops.triton_activation import table_gradient

    codec = get_codec(**spec)
    for numel in SIZES:
        encoded = codec.encode(sample(numel, dtype).to(DEVICE))
        dy = sample(numel, dtype).flip(0).to(DEVICE)
        # The interpreter rounds subnormal results its own way.
        dy = torch.where(dy.abs() < 1e-30, 0.0, dy)
        dx = torch.empty_like(dy)
        table_gradient(dy, encoded.tensors, dx, codec)
        assert same(dx, dy * codec.decode(encoded))


def run(function, x, codec, name, patch, in_triton):
    asked = []
    patch.setattr(fused_activation, "runs_in_triton", lambda t: asked.append(t) or in_triton)
    y = activation.compressed_activation(function, x, codec, function=name)
    (dx,) = torch.autograd.grad(y, x, torch.linspace(-1, 2, y.numel()).view_as(y).to(y))
    assert asked
    return y.detach(), dx


# The interpreter reads subnormal bf16 numbers wrong, so there no kernel gives all the values of a module.
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("spec", [{"name": "step1", "activation": "relu"}, {"name": "int4"}])
def test_the_autograd_function_takes_the_kernels(spec, dtype, monkeypatch):
    from slimfit_ds.activations.ops import triton_activation

    launched = []
    for name in ("table_forward", "integer_forward", "table_gradient", "integer_gradient"):
        kernel = getattr(triton_activation, name)
        monkeypatch.setattr(
            triton_activation, name, lambda *a, kernel=kernel, name=name: launched.append(name) or kernel(*a)
        )
    layer, codec = nn.ReLU(), get_codec(**spec)
    x = sample(5001, dtype, finite=True).to(DEVICE).view(3, 1667).requires_grad_()
    found = run(layer.forward, x, codec, "relu", monkeypatch, True)
    kind = "table" if spec["name"] == "step1" else "integer"
    assert launched == [f"{kind}_forward", f"{kind}_gradient"]
    expected = run(layer.forward, x, codec, "relu", monkeypatch, False)
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", ["step5", "int8"])
def test_a_module_whose_values_differ_keeps_them(codec, dtype, monkeypatch):
    """It agrees with GELU on a few numbers, not on all: forward is its own, backward the kernel's."""

    class Nearly(nn.Module):
        def forward(self, x):
            return torch.where(x == -7.5, torch.ones_like(x), F.gelu(x))

    layer, options = Nearly(), {"activation": "gelu"} if codec == "step5" else {}
    x = torch.linspace(-8, 8, 65, device=DEVICE, dtype=dtype).requires_grad_()
    y, dx = run(layer.forward, x, get_codec(codec, **options), "gelu", monkeypatch, True)
    assert torch.equal(y, layer(x))
    assert y[x == -7.5].item() == 1
    monkeypatch.setattr(fused_activation, "runs_in_triton", lambda t: False)
    _, expected = run(F.gelu, x, get_codec(codec, **options), "gelu", monkeypatch, False)
    torch.testing.assert_close(dx, expected, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


MODULES = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "gelu_tanh_unfused": NewGELU(),
    "silu": nn.SiLU(),
    "quick_gelu_unfused": QuickGELU(),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("form", MODULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_form_rounds_where_the_module_rounds(form, dtype):
    """Nearly all normal numbers agree in every bit; a form that rounds elsewhere misses 2 % and more of them."""
    from slimfit_ds.activations.ops import triton_elementwise
    from slimfit_ds.activations.ops.triton_activation import apply

    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite() & (numbers.abs() >= torch.finfo(dtype).tiny)].to(DEVICE)
    values = torch.empty_like(numbers)
    apply(numbers, values, getattr(triton_elementwise, form))
    expected = MODULES[form](numbers)
    agree = (values == expected) | (values.isnan() & expected.isnan())
    assert agree.float().mean() > 0.99
