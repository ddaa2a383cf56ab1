"""The codecs' Triton kernels against the torch versions, bit for bit; see `triton_cases` for where they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, FLOATS, INTERPRETED, MARKS, SIZES, by_kernel, kernels, same, sample

from slimfit_ds.activations.codecs import channels, get_codec
from slimfit_ds.activations.codecs.absmax import AbsmaxCodec
from slimfit_ds.activations.codecs.channels import StandardisedChannels
from slimfit_ds.activations.codecs.packing import split_planes
from slimfit_ds.activations.codecs.paper import TopK

pytest.importorskip("triton")

pytestmark = MARKS
ABSMAX = [("int8", 64), ("int6", 64), ("int4", 32), ("int8", 8), ("int4", 128), ("int4", 24)]
STEPS = [(bits, name) for bits in (5, 4, 1) for name in ("gelu", "relu", "relu2")]


@pytest.mark.parametrize(("name", "group"), ABSMAX)
@pytest.mark.parametrize("dtype", FLOATS)
def test_absmax(name: str, group: int, dtype: torch.dtype) -> None:
    codec = get_codec(name, group=group)
    for numel in SIZES:
        x = sample(numel, dtype)
        expected = codec.encode(x)
        kept, y = by_kernel(codec, x)
        assert same(kept.tensors[1], expected.tensors[1]), "steps"
        assert same(y, codec.decode(expected)), "decoded values"
        # The codes of a non-finite group are unspecified.
        finite = kept.tensors[1].isfinite()
        for (width, ours), (_, theirs) in zip(
            split_planes(kept.tensors[0], numel, codec.bits),
            split_planes(expected.tensors[0], numel, codec.bits),
            strict=True,
        ):
            defined = finite.repeat_interleave(group * width // 8)[: len(ours)]
            assert torch.equal(ours[defined], theirs[defined]), "codes"


@pytest.mark.parametrize(("bits", "name"), STEPS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_step_derivatives(bits: int, name: str, dtype: torch.dtype) -> None:
    codec = get_codec(f"step{bits}", activation=name)
    for numel in SIZES:
        x = sample(numel, dtype, finite=name == "relu2")
        expected = codec.encode(x)
        kept, y = by_kernel(codec, x)
        if name == "relu2":
            # A sum over the tensor depends on the order of its terms.
            torch.testing.assert_close(kept.tensors[1], expected.tensors[1])
            if DEVICE == "cuda":
                continue
        assert torch.equal(kept.tensors[0], expected.tensors[0])
        assert same(y, codec.decode(expected))


@pytest.mark.parametrize("name", ["fixed8", "fixed4", "ufixed8"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fixed_point(name: str, dtype: torch.dtype) -> None:
    codec = get_codec(name)
    for numel in (*SIZES, 4096):
        # Over both ends of every format, with ties of its grid.
        x = sample(numel, dtype)
        x[-5:] = torch.tensor([65504.0, -65504.0, 0.03125, 0.09375, 0.25], dtype=dtype)
        expected = codec.encode(x)
        kept, y = by_kernel(codec, x)
        assert torch.equal(kept.tensors[0], expected.tensors[0])
        assert torch.equal(y, codec.decode(expected))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("share", [0.15, 1.0])
def test_pruning(dtype: torch.dtype, share: float) -> None:
    codec = TopK("t", share)
    for numel in SIZES:
        x = sample(numel, dtype)
        kept, y = by_kernel(codec, x)
        expected = codec.encode(x)
        for ours, theirs in zip((*kept.tensors, y), (*expected.tensors, codec.decode(expected)), strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


# By name: shape, and the dimension order in memory where it is not that of the shape.
LAYOUTS = {
    "tokens": ((3, 17, 40), None),
    "transposed": ((33, 70), (1, 0)),
    "heads outside": ((2, 3, 11, 24), None),
    "tokens outside": ((2, 3, 11, 24), (0, 2, 1, 3)),
    "channels outside": ((2, 3, 11, 24), (3, 1, 0, 2)),
    "one token": ((1, 1, 48), None),
}
CHANNELS = {bits: StandardisedChannels(AbsmaxCodec(f"int{bits}", bits, 32)) for bits in (8, 4)}


def _channels(layout: str, dtype: torch.dtype) -> Tensor:
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

    def on_the_cpu(lying: Tensor, order: tuple[int, ...]) -> tuple[Tensor, ...]:
        with kernels(on=False):
            found = statistics(lying.cpu(), order)
        return tuple(each.to(lying.device) for each in found)

    monkeypatch.setattr(channels, "_statistics", on_the_cpu)
    if INTERPRETED:
        from triton.runtime import interpreter

        # The interpreter of earlier versions of Triton rounds twice in a fused multiply-add.
        if not hasattr(interpreter._interpreter, "fma_fp32"):
            monkeypatch.setattr(torch, "addcmul", _rounded_twice)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_statistics_of_channels(layout: str, dtype: torch.dtype) -> None:
    """Sums, so close and not equal; also with a row a thousand times the others, and one of infinity."""
    for size in (1, 1000, float("inf")):
        x = _channels(layout, dtype)
        x[0, ..., 1] *= size
        lying, order, _ = channels._rows_innermost(x)
        expected = channels._statistics(lying, order)
        with kernels() as asked:
            found = channels._statistics(lying.to(DEVICE), order)
        assert asked
        (rows, mean, deviation), (expected_rows, expected_mean, expected_deviation) = found, expected
        torch.testing.assert_close(rows.cpu(), expected_rows, rtol=2**-7, atol=0)
        torch.testing.assert_close(mean.cpu(), expected_mean, equal_nan=True)
        torch.testing.assert_close(deviation.cpu(), expected_deviation, equal_nan=True)


@pytest.mark.usefixtures("same_statistics")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", CHANNELS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_channels(bits: int, layout: str, dtype: torch.dtype) -> None:
    codec, x = CHANNELS[bits], _channels(layout, dtype)
    expected = codec.encode(x)
    kept, y = by_kernel(codec, x)
    assert all(torch.equal(a, b) for a, b in zip(kept.tensors, expected.tensors, strict=True))
    assert torch.equal(y, codec.decode(expected))
    assert y.stride() == x.stride()


@pytest.mark.usefixtures("same_statistics")
@pytest.mark.parametrize("dtype", FLOATS)
def test_channels_with_non_finite_values(dtype: torch.dtype) -> None:
    # The codes of NaN depend on its sign, which devices choose differently; what they decode to does not.
    x = _channels("tokens", dtype)
    x[0, 3, 5], x[1, 4, 30], x[2, 9, 31] = torch.nan, torch.inf, -torch.inf
    _, y = by_kernel(CHANNELS[8], x)
    assert not y[..., 5].isfinite().any()
    assert same(y, CHANNELS[8].decode(CHANNELS[8].encode(x)))


@pytest.mark.usefixtures("same_statistics")
def test_channels_of_a_view_with_gaps() -> None:
    view = torch.randn(6, 5, 3 * 16, generator=torch.Generator().manual_seed(0))[..., 16:32]
    expected = CHANNELS[8].encode(view)
    with kernels():
        kept = CHANNELS[8].encode(view if INTERPRETED else view.to(DEVICE))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(kept.tensors, expected.tensors, strict=True))
