"""Dropout in C from a seed and a position: the generator against its definition, masks by their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import checkpoint as plain_checkpoint

from slimfit_ds.activations.checkpoint import checkpoint
from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.ops.cpu_dropout import (
    CpuMask,
    counters_for,
    drop,
    runs_in_c,
    softmax_gradient,
)
from slimfit_ds.activations.ops.norm import NormKind, compressed_norm
from slimfit_ds.activations.ops.philox_dropout import philox_dropout
from slimfit_ds.activations.storing import RECIPE, SHARED

pytestmark = pytest.mark.skipif(not runs_in_c(torch.empty(1)), reason="needs a C compiler")

FLOATS = [torch.float32, torch.bfloat16, torch.float64]
TILE, COUNTERS = 256, 32


def philox(counters: np.ndarray, seed: int) -> np.ndarray:
    """Philox 4x32-10 as Salmon et al. (2011) define it: uint32 [4, n] of 64-bit counters [n]."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c = [counters & low, counters >> half, np.zeros_like(counters), np.zeros_like(counters)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> half) ^ c[1] ^ np.uint64(key[0]), b & low, (a >> half) ^ c[3] ^ np.uint64(key[1]), a & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c).astype(np.uint32)


def expected_keep(p: float, seed: int, first: int, numel: int) -> np.ndarray:
    """Which elements of a matrix stay: 16 bits each, in tiles of 32 counters, word by word."""
    count = counters_for(numel)
    words = philox(np.arange(first, first + count, dtype=np.uint64), seed).reshape(4, -1, COUNTERS)
    halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).transpose(1, 0, 2, 3).reshape(-1)[:numel]
    return halves >= round(p * 65536)


def mask(p: float = 0.3, seed: int = 5, first: int = 0) -> CpuMask:
    return CpuMask(p, torch.tensor(seed), first)


def dropped(x: torch.Tensor, p: float = 0.3) -> torch.Tensor:
    return philox_dropout(nn.Dropout(p), x, p)


def test_the_reference_is_philox():
    """Known answers published with the generator (Random123, kat_vectors)."""
    assert [hex(w) for w in philox(np.zeros(1, np.uint64), 0)[:, 0]] == [
        "0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [1, (1 << 62) + 987654321])
@pytest.mark.parametrize("first", [0, (1 << 32) - 100])
@pytest.mark.parametrize("numel", [1, TILE, 3 * TILE + 77])
def test_the_mask_is_that_of_philox(seed, first, numel):
    y = torch.empty(numel)
    drop(torch.ones(numel), y, mask(0.25, seed, first))
    assert np.array_equal(y.numpy() != 0, expected_keep(0.25, seed, first, numel))


def test_matrices_take_counters_of_their_own():
    """So that any number of them may be taken at a time."""
    x, whole = torch.ones(5, 7, 83), torch.empty(5, 7, 83)
    drop(x, whole, mask(), 5)
    for start, stop in ((0, 2), (2, 5)):
        part = torch.empty(stop - start, 7, 83)
        drop(x[start:stop], part, mask().after(start, 7 * 83), stop - start)
        assert torch.equal(part, whole[start:stop])
    assert not torch.equal(whole[0] != 0, whole[1] != 0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_scale_and_no_pattern(p, dtype):
    torch.manual_seed(0)
    x = (1 + torch.rand(400, 501)).to(dtype)
    y = dropped(x, p)
    kept, n = y != 0, x.numel()
    level = round(p * 65536)
    exact = torch.promote_types(dtype, torch.float32)
    factor = torch.tensor(65536 / (65536 - level), dtype=exact)
    assert torch.equal(y[kept], (x.to(exact) * factor).to(dtype)[kept])
    assert abs(int(kept.sum()) - n * (1 - p)) < 5 * (n * p * (1 - p)) ** 0.5
    # Counts of rows and columns vary as binomial ones do.
    for dim in (0, 1):
        counts, length = kept.float().sum(dim), x.shape[dim]
        assert 0.7 < float(counts.var() / (length * p * (1 - p))) < 1.4
    # Neighbours at the distances of halves, words, counters and tiles are independent.
    flat = kept.flatten().double() - kept.double().mean()
    for distance in (1, 2, 3, 4, 64, 128, 255, 256, 257, 501, 512):
        correlation = float((flat[distance:] * flat[:-distance]).mean() / flat.square().mean())
        assert abs(correlation) < 5 / n**0.5


def test_calls_are_independent_and_repeat_from_the_seed():
    x = torch.ones(200, 500)
    torch.manual_seed(5)
    masks = [(dropped(x, 0.5) != 0).double() * 2 - 1 for _ in range(6)]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(float((one * other).mean())) < 5 / x.numel() ** 0.5
    torch.manual_seed(5)
    assert torch.equal((dropped(x, 0.5) != 0), masks[0] > 0)
    torch.manual_seed(6)
    assert not torch.equal((dropped(x, 0.5) != 0), masks[0] > 0)


def test_a_saved_generator_goes_on_where_it_was():
    """As after a resumed run."""
    x = torch.ones(1000)
    dropped(x)
    state = torch.get_rng_state()
    following = [dropped(x) for _ in range(3)]
    torch.set_rng_state(state)
    assert all(torch.equal(dropped(x), y) for y in following)


@pytest.mark.parametrize("dtype", FLOATS)
def test_backward_has_the_mask_of_forward_and_keeps_nothing(dtype):
    torch.manual_seed(0)
    x = torch.randn(77, 130).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropped(x)
    assert not kept
    torch.rand(7)
    dy = torch.randn(130, 77).to(dtype).t()
    (dx,) = torch.autograd.grad(y, x, dy)
    level = round(0.3 * 65536)
    wide = torch.where(y != 0, dy.double() * (65536 / (65536 - level)), 0)
    torch.testing.assert_close(dx.double(), wide, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("way", ["reentrant", "not reentrant", "ours"])
def test_recomputation_draws_the_same_mask(way):
    x = torch.ones(64, 96, requires_grad=True)

    def part(t):
        return dropped(dropped(t) * t)

    torch.manual_seed(1)
    if way == "ours":
        y = checkpoint(part, x, codec="exact")
    else:
        y = plain_checkpoint.checkpoint(part, x, use_reentrant=way == "reentrant")
    torch.rand(3)
    y.sum().backward()
    # Of m1 m2 x^2 at 1; the two masks differ, so one drawn anew would show.
    torch.testing.assert_close(x.grad, 2 * y.detach())
    assert 0.4 < float((y != 0).float().mean()) < 0.6


def test_the_output_can_be_made_again_from_a_stored_norm():
    layer = nn.LayerNorm(64)
    x = torch.randn(10, 64, requires_grad=True)
    y = compressed_norm(
        layer, x, layer.weight, layer.bias, NormKind(True, 1e-5), get_codec("int8"), recipe=True
    )
    z = dropped(y)
    payload = SHARED.find(z.detach(), RECIPE)
    assert payload is not None
    again = payload.decode().view_as(z)
    assert (again[z == 0] == 0).all()
    torch.testing.assert_close(again, z.detach(), rtol=0, atol=0.1)


@pytest.mark.parametrize("p", [0.0, 1e-7, 1 - 1e-7, 1.0])
def test_nothing_to_draw(p):
    x = torch.ones(8, 8, requires_grad=True)
    y = dropped(x, p)
    torch.testing.assert_close(y, x * round(1 - p))


def test_without_a_kernel_it_is_pytorchs(monkeypatch):
    x = torch.randn(9, 5).half().requires_grad_()
    results = []
    for function in (lambda t: nn.functional.dropout(t, 0.4), lambda t: dropped(t, 0.4)):
        torch.manual_seed(2)
        y = function(x)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 16, 16), (2, 40, 197), (1, 3, 1000)])
@pytest.mark.parametrize("p", [None, 0.3])
def test_the_gradient_of_scores(dtype, shape, p):
    torch.manual_seed(0)
    exact = torch.promote_types(dtype, torch.float32)
    scores = torch.randn(shape, dtype=torch.float64)
    given = scores.softmax(-1).to(exact)
    upstream = torch.randn(shape).to(dtype)
    factors = torch.ones(shape, dtype=torch.float64)
    if p is not None:
        size = shape[1] * shape[2]
        kept = [expected_keep(p, 9, 7 + m * counters_for(size), size) for m in range(shape[0])]
        factors = torch.from_numpy(np.stack(kept)).view(shape).double() * (65536 / (65536 - round(p * 65536)))
    leaf = scores.requires_grad_()
    (expected,) = torch.autograd.grad((leaf.softmax(-1) * factors * upstream.double()).sum(), leaf)
    found, after = upstream.clone(), torch.empty(shape, dtype=dtype)
    softmax_gradient(given, found, after, None if p is None else mask(p, 9, 7), 0.25)
    error = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close(after.double(), given.double() * factors, rtol=error, atol=0)
    torch.testing.assert_close(found.double(), 0.25 * expected, rtol=2 * error, atol=2 * error)


def test_any_number_of_threads_gives_the_same_bits():
    x, p = torch.randn(6, 100, 130), torch.rand(6, 100, 130)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        y, gradient = torch.empty_like(x), x.clone()
        drop(x, y, mask(), 6)
        softmax_gradient(p, gradient, None, mask(), 0.5)
        results.append((y, gradient))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
