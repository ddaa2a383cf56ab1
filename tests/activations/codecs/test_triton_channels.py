"""Channels standardised inside the kernels against the torch version; run as `test_triton_kernels.py` is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, FLOATS, INTERPRETED, MARKS, by_kernel, same

from slimfit_ds.activations import channels
from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.codecs.rounding import RandomBits

pytest.importorskip("triton")

pytestmark = MARKS

# By name: shape, and the dimension order in memory of 4-dimensional ones.
LAYOUTS = {
    "tokens": ((3, 17, 40), None),
    "rows": ((130, 67), None),
    "transposed": ((33, 70), (1, 0)),
    "heads outside": ((2, 3, 11, 24), None),
    "tokens outside": ((2, 3, 11, 24), (0, 2, 1, 3)),
    "channels outside": ((2, 3, 11, 24), (3, 1, 0, 2)),
    "one head": ((2, 1, 13, 20), (0, 2, 1, 3)),
    "one token": ((1, 1, 48), None),
}


def _tensor(layout: str, dtype: torch.dtype) -> Tensor:
    """Channels of different means and sizes, one of them constant, dense in the layout's order."""
    shape, order = LAYOUTS[layout]
    g = torch.Generator().manual_seed(len(layout))
    x = torch.randn(shape, generator=g)
    width = shape[-1]
    x = x * torch.exp(torch.randn(width, generator=g)) + 3 * torch.randn(width, generator=g)
    x[..., 2] = 3.5
    x = x.to(dtype)
    if order is None:
        return x
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


def _rounded_twice(offset: Tensor, x: Tensor, scale: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(x.float() * scale + offset)


@pytest.fixture
def same_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every device those of the CPU (a sum depends on the order of its terms), and the same kind of sum."""
    statistics = channels._statistics

    def on_the_cpu(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = statistics(x.cpu().contiguous())
        return mean.to(x.device), deviation.to(x.device)

    monkeypatch.setattr(channels, "_statistics", on_the_cpu)
    if INTERPRETED:
        from triton.runtime import interpreter

        # The interpreter of earlier versions of Triton rounds twice in a fused multiply-add.
        if not hasattr(interpreter._interpreter, "fma_fp32"):
            monkeypatch.setattr(torch, "addcmul", _rounded_twice)


@pytest.mark.usefixtures("same_statistics")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["int8", "int4", "lm4", "lm2"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_channels(name: str, layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = get_codec(f"{name}_channel")
    x = _tensor(layout, dtype)
    expected = codec.encode(x)
    kept, y = by_kernel(codec, x, monkeypatch, channels)
    assert len(kept.tensors) == len(expected.tensors)
    for ours, theirs in zip(kept.tensors, expected.tensors, strict=True):
        assert torch.equal(ours, theirs)
    decoded = codec.decode(expected)
    assert torch.equal(y, decoded)
    assert y.stride() == x.stride()


@pytest.mark.usefixtures("same_statistics")
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_stochastic_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = _tensor("tokens", torch.bfloat16)
    bits = RandomBits(seed=1).draw(x.numel(), x.device, None)
    monkeypatch.setattr(RandomBits, "draw", lambda self, n, device, generator: bits[:n].to(device))
    codec = get_codec(f"{name}_channel", rounding="stochastic")
    expected = codec.encode(x)
    kept, y = by_kernel(codec, x, monkeypatch, channels)
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors, expected.tensors, strict=True))
    assert torch.equal(y, codec.decode(expected))


@pytest.mark.usefixtures("same_statistics")
@pytest.mark.parametrize("name", ["int8", "int4", "lm4", "lm2"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_non_finite_values(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # The codes of NaN depend on its sign, which devices choose differently; what they decode to does not.
    x = _tensor("tokens", dtype)
    x[0, 3, 5], x[1, 4, 30], x[2, 9, 31] = torch.nan, torch.inf, -torch.inf
    codec = get_codec(f"{name}_channel")
    _, y = by_kernel(codec, x, monkeypatch, channels)
    assert not y[..., 5].isfinite().any()
    assert same(y, codec.decode(codec.encode(x)))


@pytest.mark.usefixtures("same_statistics")
def test_a_view_with_gaps_is_standardised_first(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(6, 5, 3 * 16, generator=torch.Generator().manual_seed(0))
    codec = get_codec("int8_channel")
    expected = codec.encode(whole[..., 16:32])
    with monkeypatch.context() as patch:
        patch.setattr(channels, "runs_in_triton", lambda t: True)
        kept = codec.encode(whole.to(DEVICE)[..., 16:32])
        y = codec.decode(kept)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(kept.tensors, expected.tensors, strict=True))
    assert torch.equal(y.cpu(), codec.decode(expected))


@pytest.mark.parametrize("dtype", FLOATS)
def test_standardisation_is_that_of_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    mean, std = torch.randn(1, 3, 1, 700, generator=g), torch.rand(1, 3, 1, 700, generator=g)
    std[..., 5], std[..., 6] = 0, torch.nan
    mean, std = mean.to(dtype), std.to(dtype)
    expected = channels._standardisation(mean, std)
    monkeypatch.setattr(channels, "runs_in_triton", lambda t: True)
    found = channels._standardisation(mean.to(DEVICE), std.to(DEVICE))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert same(ours.cpu(), theirs)
