"""Dropout from a seed and a position: the generator against its definition, the masks by their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import checkpoint as plain_checkpoint
from triton_cases import DEVICE, FLOATS, MARKS

from slimfit_ds.activations.checkpoint import checkpoint
from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.ops import philox_dropout as module
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm
from slimfit_ds.activations.ops.philox_dropout import philox_dropout
from slimfit_ds.activations.storing import RECIPE, SHARED

pytest.importorskip("triton")

pytestmark = MARKS


@pytest.fixture(autouse=True)
def in_triton(monkeypatch):
    monkeypatch.setattr(module, "runs_in_triton", lambda t: True)


def drop(x, p=0.3):
    return philox_dropout(nn.Dropout(p), x, p)


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
def test_share_and_scale(p, dtype):
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


def test_calls_are_independent_and_repeat_from_the_seed():
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
def test_backward_has_the_mask_of_forward_and_keeps_nothing(dtype):
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
def test_recomputation_draws_the_same_mask(way):
    x = torch.ones(64, 96, device=DEVICE, requires_grad=True)

    def part(t):
        return drop(drop(t) * t)

    torch.manual_seed(1)
    if way == "ours":
        y = checkpoint(part, x, codec="exact")
    else:
        y = plain_checkpoint.checkpoint(part, x, use_reentrant=way == "reentrant")
    torch.rand(3, device=DEVICE)
    y.sum().backward()
    # Of m1 m2 x^2 at 1; the two masks differ, so one drawn anew would show.
    torch.testing.assert_close(x.grad, 2 * y.detach())
    assert 0.4 < float((y != 0).float().mean()) < 0.6


def test_the_output_can_be_made_again_from_a_stored_norm():
    layer = nn.LayerNorm(64).to(DEVICE)
    x = torch.randn(10, 64, device=DEVICE, requires_grad=True)
    y = compressed_norm(
        layer, x, layer.weight, layer.bias, NormKind(True, 1e-5), get_codec("int8"), recipe=True
    )
    z = drop(y)
    payload = SHARED.find(z.detach(), RECIPE)
    assert payload is not None
    again = payload.decode().view_as(z)
    assert (again[z == 0] == 0).all()
    torch.testing.assert_close(again, z.detach(), rtol=0, atol=0.1)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_nothing_to_draw(p):
    x = torch.ones(8, 8, device=DEVICE, requires_grad=True)
    assert torch.equal(drop(x, p), x * (1 - p))
