"""The standardisation of channels in front of integers."""

from __future__ import annotations

import pytest
import torch

from slimfit_ds.activations.codecs import absmax, channels, get_codec
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.channels import StandardisedChannels

CODECS = {bits: StandardisedChannels(AbsmaxCodec(f"int{bits}", bits, 32)) for bits in (8, 4)}


def with_outliers(*shape, dtype=torch.float32):
    """N(0, 1) with one far and one large channel."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    x[..., 3] = x[..., 3] * 0.5 - 12
    x[..., 5] *= 20
    return x.to(dtype)


def error(codec, x):
    found = codec.decode(codec.encode(x))
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    ordinary = [c for c in range(x.shape[-1]) if c not in (3, 5)]
    return ((found - x)[..., ordinary].float().norm() / x[..., ordinary].float().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.012), (4, 0.12)])
def test_outlier_channels_do_not_spoil_the_others(bits, bound, dtype):
    x = with_outliers(64, 16, 64, dtype=dtype)
    assert error(CODECS[bits], x) < bound
    assert error(CODECS[bits].inner, x) > 2 * bound


def test_heads_have_channels_of_their_own():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 50, 8) * torch.tensor([1.0, 100.0, 0.01, 5.0]).view(1, 4, 1, 1)
    found = CODECS[8].decode(CODECS[8].encode(x.transpose(1, 2).contiguous().transpose(1, 2)))
    for head in range(4):
        assert (found - x)[:, head].norm() < 0.02 * x[:, head].norm()


def test_constant_channels_are_exact():
    x = torch.full((5, 7, 16), 3.5)
    torch.testing.assert_close(CODECS[8].decode(CODECS[8].encode(x)), x)


@pytest.mark.parametrize("shape", [(64, 16, 64), (2, 4, 8, 16)])
def test_bytes(shape):
    codec = get_codec("int8_channel")
    x = torch.randn(shape, dtype=torch.bfloat16)
    assert codec.encode(x).nbytes == codec.nbytes(x.shape, x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", CODECS)
@pytest.mark.parametrize("rows", [1, 5])
def test_parts_give_the_bits_of_the_whole(bits, dtype, rows, monkeypatch):
    x, codec = with_outliers(7, 9, 64, dtype=dtype), CODECS[bits]
    whole = codec.encode(x)
    decoded = codec.decode(whole)
    monkeypatch.setattr(absmax, "_PART", rows * 64)
    parts = codec.encode(x)
    assert (parts.shape, parts.dtype, parts.order) == (whole.shape, whole.dtype, whole.order)
    assert all(torch.equal(a, b) for a, b in zip(parts.tensors, whole.tensors, strict=True))
    assert torch.equal(codec.decode(parts), decoded)


@pytest.mark.parametrize("shape", [(2, 3, 8, 64), (3, 4, 12)])
def test_what_cannot_be_divided_is_taken_whole(shape, monkeypatch):
    monkeypatch.setattr(absmax, "_PART", 64)
    codec = get_codec("int8_channel")
    x = torch.randn(shape)
    torch.testing.assert_close(codec.decode(codec.encode(x)), x, rtol=0, atol=0.05)
    turned = torch.randn(5, 6, 64).transpose(0, 1)
    torch.testing.assert_close(codec.decode(codec.encode(turned)), turned, rtol=0, atol=0.05)


def with_loud_token(size, tokens=200, width=128, dtype=torch.float32):
    """Hidden states like a decoder's: [2, tokens, width], two channels of the first token at `size` times the median."""
    x = with_outliers(2, tokens, width, dtype=torch.float32)
    x[:, 0, [7, 70]] = size * x.abs().median()
    return x.to(dtype)


@pytest.mark.parametrize("size", [500, 2_600, 25_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loud_token_does_not_spoil_the_others(size, dtype):
    plain, loud = with_loud_token(0, dtype=dtype), with_loud_token(size, dtype=dtype)
    codec = get_codec("int8_channel")
    found, expected = ((codec.decode(codec.encode(x)) - x)[:, 1:].float().norm() for x in (loud, plain))
    assert found < 1.1 * expected
    first = codec.decode(codec.encode(loud))[:, 0, [7, 70]]
    torch.testing.assert_close(first, loud[:, 0, [7, 70]], rtol=0.01, atol=0)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)])
def test_statistics_are_those_of_rows_divided_by_their_root_mean_square(order, monkeypatch):
    x = with_outliers(3, 4, 31, 16, dtype=torch.float64) * torch.rand(3, 4, 31, 1).exp().square()
    x[1, 2, 0, 7] *= 1000
    lying = x.float().permute(order).contiguous().permute([order.index(d) for d in range(4)])
    sizes = x.square().mean(-1)
    mean = (x / sizes.sqrt()[..., None]).mean((0, 2))
    deviation = (x / sizes.sqrt()[..., None]).var((0, 2), correction=0).sqrt()
    for chunk in (channels._CHUNK, 5 * 16):
        monkeypatch.setattr(channels, "_CHUNK", chunk)
        *_, rows, found_mean, found_deviation = get_codec("int8_channel").encode(lying).tensors
        in_memory = order if order[-1] == 3 else (0, 1, 2, 3)
        torch.testing.assert_close(
            rows.double(), sizes.sqrt()[..., None].permute(in_memory).flatten(), rtol=2**-8, atol=0
        )
        torch.testing.assert_close(found_mean.view(4, 16).double(), mean, rtol=2**-8, atol=2**-8)
        torch.testing.assert_close(found_deviation.view(4, 16).double(), deviation, rtol=2**-8, atol=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e3])
def test_quiet_and_loud_rows_are_rounded_to_their_own_size(size, dtype):
    """A norm divides a row by its size, and would make the rounding of others a signal."""
    x = with_outliers(50, 128).to(dtype)
    x[::7] *= size
    found = get_codec("int8_channel").decode(get_codec("int8_channel").encode(x))
    off = (found - x).float().norm(dim=1) / x.float().norm(dim=1)
    assert off.max() < 0.01


def test_rows_of_zeros_stay_zeros():
    x = with_outliers(50, 128)
    x[[0, 7, 8]] = 0
    found = get_codec("int8_channel").decode(get_codec("int8_channel").encode(x))
    assert not found[[0, 7, 8]].any()
    x.zero_()
    assert not get_codec("int8_channel").decode(get_codec("int8_channel").encode(x)).any()


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1.0, 1e15])
def test_rows_of_zeros_and_of_any_size(scale):
    x = with_outliers(40, 64) * scale
    x[::3] = 0
    found = get_codec("int8_channel").decode(get_codec("int8_channel").encode(x))
    assert found.isfinite().all()
    # What is next to nothing only has to stay that.
    bound = 0.02 if scale > 1e-20 else 2
    assert (found - x).norm() <= bound * x.norm()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_overflow_stays_visible(value):
    x = with_outliers(40, 128)
    x[3, 9] = value
    found = get_codec("int8_channel").decode(get_codec("int8_channel").encode(x))
    assert not found[:, 9].isfinite().any()
    others = [row for row in range(40) if row != 3]
    assert found[others, 64:].isfinite().all()
