"""Norms, activation functions and dropout in Triton kernels, against float64 and the torch path; see `triton_cases`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from triton_cases import DEVICE, FLOATS, MARKS, SIZES, kernels, same, sample

from slimfit_ds.activations.checkpoint import checkpoint
from slimfit_ds.activations.codecs import Encoded, get_codec
from slimfit_ds.activations.ops import activation
from slimfit_ds.activations.ops.dropout import philox_dropout
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm

pytest.importorskip("triton")

pytestmark = MARKS


# Norms


def _packed_norm(codec, x, kind):
    from slimfit_ds.activations.ops.triton_norm import encode_norm

    kept = tuple(x.new_empty(n, dtype=dtype) for dtype, n in codec.storage(x.numel(), torch.float32))
    rstd = x.new_empty(len(x), dtype=torch.float32)
    encode_norm(x, kept, rstd, kind, codec)
    return kept, rstd, codec.decode(Encoded(kept, x.shape, torch.float32)).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("name", "group", "width"), [("int4", 32, 96), ("int6", 64, 192), ("int8", 64, 64)])
def test_norm_forward_and_backward(name, group, width, centred, dtype, monkeypatch):
    """With more rows than programs and fewer, through the codec's own decoder."""
    from slimfit_ds.activations.ops import triton_norm

    monkeypatch.setattr(triton_norm, "_PROGRAMS", 2)
    torch.manual_seed(0)
    codec, kind = get_codec(name, group=group), NormKind(centred, 1e-5, 0.5)
    for tokens in (1, 5):
        x = (3 * torch.randn(tokens, width) + 1).to(dtype).to(DEVICE)
        kept, rstd, x_hat = _packed_norm(codec, x, kind)
        exact = x.double()
        exact = exact - exact.mean(-1, keepdim=True) if centred else exact
        true_rstd = (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        torch.testing.assert_close(rstd[:, None].double(), true_rstd, rtol=1e-5, atol=0)
        steps = kept[1].double().repeat_interleave(group).view(tokens, width)
        # Half a step; a tie may fall to either side of the kernel's rounding of x_hat.
        assert ((x_hat - exact * true_rstd).abs() <= 0.501 * steps).all()

        dy, scale = torch.randn(tokens, width).to(x), torch.randn(width).to(x)
        for weight, to_input, to_scale, to_bias in (
            (scale, True, False, False),
            (None, True, False, False),
            (scale, True, True, True),
            (scale, False, True, True),
            (scale, True, False, True),
            (scale, True, True, False),
        ):
            dx = torch.full_like(dy, torch.nan) if to_input else None
            how = (weight, dx, to_scale, to_bias, kind, codec)
            sums = triton_norm.norm_gradients(dy, kept, rstd, *how)
            g = dy.double()
            expected = [(g * x_hat).sum(0)] * to_scale + [g.sum(0)] * to_bias
            assert len(sums) == len(expected)
            for found, total in zip(sums.double(), expected, strict=True):
                torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-5)
            if dx is None:
                continue
            g = g if weight is None else g * (weight.double() + 0.5)
            exact_dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
            exact_dx = (exact_dx - g.mean(-1, keepdim=True) if centred else exact_dx) * true_rstd
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(dx.double(), exact_dx, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", ["input", "weight", "weights", "all"])
@pytest.mark.parametrize("centred", [True, False])
def test_the_norm_takes_the_kernels(centred, training):
    """The torch path, which is tested against autograd, and the kernels give the same gradients."""
    layer = torch.nn.LayerNorm(64) if centred else torch.nn.RMSNorm(64, eps=1e-5)
    layer = layer.to(DEVICE)
    layer.weight.data.uniform_(0.5, 1.5)
    layer.weight.requires_grad_(training in ("weight", "weights", "all"))
    if centred:
        layer.bias.requires_grad_(training in ("weights", "all"))
    kind, bias = NormKind(centred, 1e-5), getattr(layer, "bias", None)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, device=DEVICE, requires_grad=training in ("input", "weight", "all"))
    # A gradient that is not contiguous, as a transposed consumer gives.
    weights = torch.randn(3, 2, 64, device=DEVICE).transpose(0, 1)
    wanted = [t for t in (x, layer.weight, bias) if t is not None and t.requires_grad]

    def gradients(on):
        with kernels(on) as asked:
            y = compressed_norm(layer, x, layer.weight, bias, kind, get_codec("int8"))
            found = torch.autograd.grad(y, wanted, weights)
        assert asked
        return found

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-3, atol=1e-2)


# Activation functions

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
    for bits in (5, 4, 1)
    for name in ("gelu", "relu")
]
INTEGERS = [{"name": "int4"}, {"name": "int8"}, {"name": "int6", "group": 128}]


class NewGELU(nn.Module):
    """The tanh form in single operations, each rounded to the dtype, as GPT-2 computes it."""

    def forward(self, x):
        cube = torch.pow(x, 3.0)
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * cube)))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def test_every_function_has_forms_and_a_slope():
    from slimfit_ds.activations.ops.triton_activation import _SLOPES, FORMS

    assert set(FORMS) == set(_SLOPES) == activation._IN_KERNELS == set(EXACT)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", EXACT)
def test_values_and_slopes(name, dtype):
    """Where the result is not the difference of two numbers that nearly agree."""
    from slimfit_ds.activations.ops.triton_activation import FORMS, apply, gradient

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
    gradient(dy, encoded.tensors, dx, codec, name)
    at = stored.double().requires_grad_()
    (expected,) = torch.autograd.grad(EXACT[name](at), at, dy.double())
    torch.testing.assert_close(dx.double(), expected, rtol=4 * ULP[dtype], atol=ULP[dtype])


@pytest.mark.parametrize("name", EXACT)
def test_extreme_inputs(name):
    from slimfit_ds.activations.ops.triton_activation import FORMS, apply

    x = torch.tensor([0.0, -0.0, 60.0, -60.0, 1e4, -1e4, torch.nan], device=DEVICE)
    for form in FORMS[name]:
        y = torch.empty_like(x)
        apply(x, y, form)
        torch.testing.assert_close(y, EXACT[name](x), equal_nan=True)


@pytest.mark.parametrize("spec", [*STEPS, *INTEGERS], ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", FLOATS)
def test_activation_forward_stores_what_the_codec_stores(spec, dtype):
    from slimfit_ds.activations.ops.triton_activation import FORMS, apply, forward_and_pack

    codec = get_codec(**spec)
    form = FORMS[spec.get("activation", "silu")][0]
    for numel in SIZES:
        x = sample(numel, dtype, finite=True).to(DEVICE)
        y, alone = torch.empty_like(x), torch.empty_like(x)
        kept = tuple(x.new_empty(n, dtype=kind) for kind, n in codec.storage(numel, dtype))
        forward_and_pack(x, y, kept, codec, form)
        apply(x, alone, form)
        assert same(y, alone)
        assert all(torch.equal(a, b) for a, b in zip(kept, codec.encode(x).tensors, strict=True))


@pytest.mark.parametrize("spec", STEPS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_gradient_of_a_stored_derivative_is_that_of_torch(spec, dtype):
    from slimfit_ds.activations.ops.triton_activation import gradient

    codec = get_codec(**spec)
    for numel in SIZES:
        encoded = codec.encode(sample(numel, dtype).to(DEVICE))
        dy = sample(numel, dtype).flip(0).to(DEVICE)
        # The interpreter rounds subnormal results its own way.
        dy = torch.where(dy.abs() < 1e-30, 0.0, dy)
        dx = torch.empty_like(dy)
        gradient(dy, encoded.tensors, dx, codec, spec["activation"])
        assert same(dx, dy * codec.decode(encoded))


def run(function, x, codec, name, on):
    with kernels(on) as asked:
        y = activation.compressed_activation(function, x, codec, name)
        (dx,) = torch.autograd.grad(y, x, torch.linspace(-1, 2, y.numel()).view_as(y).to(y))
    assert asked
    return y.detach(), dx


# The interpreter reads subnormal bf16 numbers wrong, so there no kernel gives all the values of a module.
@pytest.mark.parametrize("dtype", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize("spec", [{"name": "step1", "activation": "relu"}, {"name": "int4"}])
def test_the_activation_takes_the_kernels(spec, dtype, monkeypatch):
    from slimfit_ds.activations.ops import triton_activation

    launched = []
    for name in ("forward_and_pack", "gradient"):
        kernel = getattr(triton_activation, name)
        monkeypatch.setattr(
            triton_activation, name, lambda *a, kernel=kernel, name=name: launched.append(name) or kernel(*a)
        )
    layer, codec = nn.ReLU(), get_codec(**spec)
    x = sample(5001, dtype, finite=True).to(DEVICE).view(3, 1667).requires_grad_()
    found = run(layer.forward, x, codec, "relu", True)
    assert launched == ["forward_and_pack", "gradient"]
    expected = run(layer.forward, x, codec, "relu", False)
    assert same(found[0], expected[0])
    assert same(found[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", ["step5", "int8"])
def test_a_module_whose_values_differ_keeps_them(codec, dtype):
    """It agrees with GELU on a few numbers, not on all: forward is its own, backward the kernel's."""

    class Nearly(nn.Module):
        def forward(self, x):
            return torch.where(x == -7.5, torch.ones_like(x), F.gelu(x))

    layer, options = Nearly(), {"activation": "gelu"} if codec == "step5" else {}
    x = torch.linspace(-8, 8, 65, device=DEVICE, dtype=dtype).requires_grad_()
    y, dx = run(layer.forward, x, get_codec(codec, **options), "gelu", True)
    assert torch.equal(y, layer(x))
    assert y[x == -7.5].item() == 1
    _, expected = run(F.gelu, x, get_codec(codec, **options), "gelu", False)
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
    from slimfit_ds.activations.ops import triton_activation

    numbers = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite() & (numbers.abs() >= torch.finfo(dtype).tiny)].to(DEVICE)
    values = torch.empty_like(numbers)
    triton_activation.apply(numbers, values, getattr(triton_activation, form))
    expected = MODULES[form](numbers)
    agree = (values == expected) | (values.isnan() & expected.isnan())
    assert agree.float().mean() > 0.99


# Dropout


def drop(x, p=0.3):
    with kernels():
        y = philox_dropout(nn.Dropout(p), x, p)
    return y


def philox(counters, seed):
    """Philox 4x32-10 as Salmon et al. (2011) define it: uint32 [n, 4] of 64-bit counters [n]."""
    low = np.uint64(0xFFFFFFFF)
    c = [counters & low, counters >> np.uint64(32), np.zeros_like(counters), np.zeros_like(counters)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (b >> np.uint64(32)) ^ c[1] ^ np.uint64(key[0]),
            b & low,
            (a >> np.uint64(32)) ^ c[3] ^ np.uint64(key[1]),
            a & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=1)


@pytest.mark.parametrize("seed", [1, (1 << 62) + 987654321, (1 << 64) - 1])
@pytest.mark.parametrize("first", [0, (1 << 32) - 100])
def test_the_mask_is_that_of_philox(seed, first):
    from slimfit_ds.activations.ops import triton_dropout

    n, p, tile = 8201, 0.25, 1024
    x = torch.ones(n, device=DEVICE)
    y = torch.empty_like(x)
    triton_dropout.drop(x, y, p, seed, first)
    count = triton_dropout.counters_for(n)
    assert count == 3 * tile
    numbers = philox(np.arange(first, first + count, dtype=np.uint64), seed)
    # Each program takes `tile` counters; the four numbers of a counter go to elements `tile` apart.
    by_element = numbers.reshape(-1, tile, 4).transpose(0, 2, 1).reshape(-1)[:n]
    assert np.array_equal(y.cpu().numpy() != 0, by_element >= p * 2**32)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_dropout_share_and_scale(p, dtype):
    torch.manual_seed(0)
    x = (1 + torch.rand(200, 501)).to(dtype).to(DEVICE)
    y = drop(x, p)
    kept = y != 0
    assert y.dtype == dtype
    expected = (x.float() * float(np.float32(1 / (1 - p)))).to(dtype)
    assert torch.equal(y[kept], expected[kept])
    n = x.numel()
    assert abs(int(kept.sum()) - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    # No pattern along rows or columns: counts of each vary as binomial ones do.
    for dim in (0, 1):
        counts, length = kept.float().sum(dim), x.shape[dim]
        assert 0.65 < float(counts.var() / (length * p * (1 - p))) < 1.5


def test_dropouts_are_independent_and_repeat_from_the_seed():
    x = torch.ones(200, 500, device=DEVICE)
    torch.manual_seed(5)
    first, second = (drop(x, 0.5) != 0 for _ in range(2))
    agree = float((first == second).float().mean())
    assert abs(agree - 0.5) < 5 * 0.5 / x.numel() ** 0.5
    torch.manual_seed(5)
    assert torch.equal(drop(x, 0.5) != 0, first)
    torch.manual_seed(6)
    assert not torch.equal(drop(x, 0.5) != 0, first)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dropout_backward_has_the_mask_of_forward_and_keeps_nothing(dtype):
    torch.manual_seed(0)
    x = torch.randn(77, 130, device=DEVICE).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = drop(x)
    assert not kept
    torch.rand(7, device=DEVICE)
    # A strided gradient too.
    dy = torch.randn(130, 77, device=DEVICE).to(dtype).t()
    (dx,) = torch.autograd.grad(y, x, dy)
    factor = float(np.float32(1 / 0.7))
    assert torch.equal(dx, torch.where(y != 0, (dy.float() * factor).to(dtype), 0))


@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "ours"])
def test_recomputed_dropout_draws_the_same_mask(way):
    x = torch.ones(64, 96, device=DEVICE, requires_grad=True)

    def part(t):
        return drop(drop(t) * t)

    torch.manual_seed(1)
    if way == "ours":
        y = checkpoint(part, x, codec="exact")
    else:
        y = torch_checkpoint(part, x, use_reentrant=way == "reentrant")
    torch.rand(3, device=DEVICE)
    y.sum().backward()
    # Of m1 m2 x^2 at 1; the two masks differ, so one drawn anew would show.
    torch.testing.assert_close(x.grad, 2 * y.detach())
    assert 0.4 < float((y != 0).float().mean()) < 0.6


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_with_nothing_to_draw(p):
    x = torch.ones(8, 8, device=DEVICE, requires_grad=True)
    assert torch.equal(drop(x, p), x * (1 - p))
