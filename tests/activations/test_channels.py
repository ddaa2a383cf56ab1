"""The standardisation of channels in front of a codec."""

from __future__ import annotations

import pytest
import torch

from slimfit_ds.activations import channels  # noqa: F401  registers the codecs
from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.codecs import rows as row_parts


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
@pytest.mark.parametrize(("name", "bound"), [("int8", 0.012), ("int4", 0.12), ("lm4", 0.105)])
def test_outlier_channels_do_not_spoil_the_others(name, bound, dtype):
    x = with_outliers(64, 16, 64, dtype=dtype)
    assert error(get_codec(f"{name}_channel"), x) < bound
    if name != "lm4":
        assert error(get_codec(name), x) > 2 * bound


def test_the_outliers_themselves_are_close():
    x = with_outliers(64, 16, 64)
    codec = get_codec("lm4_channel")
    found = codec.decode(codec.encode(x))
    assert (found - x)[..., 3].abs().max() < 1.0
    clamped = get_codec("lm4")
    assert (clamped.decode(clamped.encode(x)) - x)[..., 3].abs().max() > 8


def test_heads_have_channels_of_their_own():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 50, 8) * torch.tensor([1.0, 100.0, 0.01, 5.0]).view(1, 4, 1, 1)
    codec = get_codec("lm4_channel")
    found = codec.decode(codec.encode(x.transpose(1, 2).contiguous().transpose(1, 2)))
    for head in range(4):
        assert (found - x)[:, head].norm() < 0.13 * x[:, head].norm()


def test_constant_channels_are_exact():
    x = torch.full((5, 7, 16), 3.5)
    codec = get_codec("int8_channel")
    torch.testing.assert_close(codec.decode(codec.encode(x)), x)


def test_bytes():
    x = torch.randn(64, 16, 64, dtype=torch.bfloat16)
    codec = get_codec("int8_channel")
    assert codec.encode(x).nbytes == codec.nbytes(x.shape, x.dtype) + 2 * 64 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int6", "int4"])
@pytest.mark.parametrize("rows", [1, 5])
def test_parts_give_the_bits_of_the_whole(name, dtype, rows, monkeypatch):
    x = with_outliers(7, 9, 64, dtype=dtype)
    codec = get_codec(f"{name}_channel")
    whole = codec.encode(x)
    decoded = codec.decode(whole)
    monkeypatch.setattr(row_parts, "_ELEMENTS", rows * 64)
    parts = codec.encode(x)
    assert (parts.shape, parts.dtype, parts.meta) == (whole.shape, whole.dtype, whole.meta)
    for found, expected in zip(parts.tensors, whole.tensors, strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(codec.decode(parts), decoded)


@pytest.mark.parametrize("shape", [(2, 3, 8, 64), (3, 4, 12)])
def test_what_cannot_be_divided_is_taken_whole(shape, monkeypatch):
    monkeypatch.setattr(row_parts, "_ELEMENTS", 64)
    codec = get_codec("int8_channel")
    x = torch.randn(shape)
    found = codec.decode(codec.encode(x))
    assert found.shape == x.shape
    torch.testing.assert_close(found, x, rtol=0, atol=0.05)
    turned = torch.randn(5, 6, 64).transpose(0, 1)
    torch.testing.assert_close(codec.decode(codec.encode(turned)), turned, rtol=0, atol=0.05)
