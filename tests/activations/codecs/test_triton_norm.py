"""The norm kernels against the formula in float64, through the codec's own decoder."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DEVICE, MARKS

from slimfit_ds.activations.codecs import Encoded, get_codec

pytest.importorskip("triton")

pytestmark = MARKS
CODECS = [("int4", 32), ("int4", 64), ("int5", 64), ("int6", 64), ("int8", 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("width", [64, 192, 768])
@pytest.mark.parametrize(("name", "group"), CODECS)
def test_forward_and_backward(name, group, width, centred, dtype):
    from slimfit_ds.activations.ops.triton_norm import encode_norm, norm_gradient

    torch.manual_seed(0)
    tokens, codec = 5, get_codec(name, group=group)
    x = (3 * torch.randn(tokens, width) + 1).to(dtype).to(DEVICE)
    kept = [x.new_empty(n, dtype=kind) for kind, n in codec.storage(x.numel(), torch.float32)]
    rstd = x.new_empty(tokens, dtype=torch.float32)
    encode_norm(x, *kept, rstd, centred=centred, eps=1e-5, grid=codec.grid, group=group)

    exact = x.double()
    exact = exact - exact.mean(-1, keepdim=True) if centred else exact
    true_rstd = (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd[:, None].double(), true_rstd, rtol=1e-5, atol=0)
    x_hat = codec.decode(Encoded(tuple(kept), x.shape, torch.float32))
    steps = kept[1].double().repeat_interleave(group).view(tokens, width)
    # Half a step; a tie may fall to either side of the kernel's rounding of x_hat.
    assert ((x_hat.double() - exact * true_rstd).abs() <= 0.501 * steps).all()

    dy, scale = torch.randn(tokens, width).to(x), torch.randn(width).to(x)
    for weight in (scale, None):
        dx = torch.empty_like(dy)
        norm_gradient(dy, *kept, rstd, weight, dx, centred=centred, offset=0.5, grid=codec.grid, group=group)
        g = dy.double() if weight is None else dy.double() * (weight.double() + 0.5)
        expected = g - x_hat.double() * (g * x_hat.double()).mean(-1, keepdim=True)
        expected = (expected - g.mean(-1, keepdim=True) if centred else expected) * true_rstd
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(dx.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("wanted", ["all", "scale", "bias", "weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "group", "width"), [("int6", 64, 192), ("int4", 32, 96), ("int8", 64, 64)])
@pytest.mark.parametrize("centred", [True, False])
def test_gradients_of_weights(centred, name, group, width, dtype, wanted, monkeypatch):
    """Against float64, with more rows than programs and fewer."""
    from slimfit_ds.activations.ops import triton_norm, triton_norm_weights

    monkeypatch.setattr(triton_norm_weights, "_PROGRAMS", 4)
    torch.manual_seed(1)
    codec = get_codec(name, group=group)
    how = {"centred": centred, "grid": codec.grid, "group": group}
    for tokens in (3, 11):
        x = (2 * torch.randn(tokens, width) - 1).to(dtype).to(DEVICE)
        kept = [x.new_empty(n, dtype=kind) for kind, n in codec.storage(x.numel(), torch.float32)]
        rstd = x.new_empty(tokens, dtype=torch.float32)
        triton_norm.encode_norm(x, *kept, rstd, eps=1e-5, **how)
        x_hat = codec.decode(Encoded(tuple(kept), x.shape, torch.float32)).double()
        dy, scale = torch.randn(tokens, width).to(x), torch.randn(width).to(x)
        dx = None if wanted == "weights" else torch.full_like(dy, torch.nan)
        to = {"to_scale": wanted != "bias", "to_bias": wanted != "scale"}
        sums = triton_norm_weights.norm_gradients(dy, *kept, rstd, scale, dx, offset=0.5, **to, **how)
        expected = torch.stack(
            [(dy.double() * x_hat).sum(0)] * to["to_scale"] + [dy.double().sum(0)] * to["to_bias"]
        )
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
        if dx is not None:
            alone = torch.empty_like(dy)
            triton_norm.norm_gradient(dy, *kept, rstd, scale, alone, offset=0.5, **how)
            tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
            torch.testing.assert_close(dx, alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", ["input", "weight", "weights", "all"])
@pytest.mark.parametrize("centred", [True, False])
def test_the_norm_takes_the_kernels(monkeypatch, centred, training):
    """The torch path, which is tested against autograd, and the kernels give the same gradients."""
    from slimfit_ds.activations.ops import norm

    layer = torch.nn.LayerNorm(64) if centred else torch.nn.RMSNorm(64, eps=1e-5)
    layer = layer.to(DEVICE)
    layer.weight.data.uniform_(0.5, 1.5)
    layer.weight.requires_grad_(training in ("weight", "weights", "all"))
    if centred:
        layer.bias.requires_grad_(training in ("weights", "all"))
    kind, bias = norm.NormKind(centred, 1e-5), getattr(layer, "bias", None)
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, device=DEVICE, requires_grad=training in ("input", "weight", "all"))
    # A gradient that is not contiguous, as a transposed consumer gives.
    weights = torch.randn(3, 2, 64, device=DEVICE).transpose(0, 1)
    wanted = [t for t in (x, layer.weight, bias) if t is not None and t.requires_grad]

    def gradients(in_triton: bool):
        taken = []
        monkeypatch.setattr(norm, "runs_in_triton", lambda t: taken.append(t) or in_triton)
        monkeypatch.setattr(norm, "gradients_of_rows", None if in_triton else gradients_of_rows)
        y = norm.compressed_norm(layer, x, layer.weight, bias, kind, get_codec("int8"))
        found = torch.autograd.grad(y, wanted, weights)
        assert taken
        return found

    gradients_of_rows = norm.gradients_of_rows
    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-3, atol=1e-2)
