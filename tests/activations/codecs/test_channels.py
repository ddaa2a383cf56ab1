"""The standardisation of channels in front of integers."""

from __future__ import annotations

import pytest
import torch

from slimfit_ds.activations.codecs import absmax, get_codec
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
