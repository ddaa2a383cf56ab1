"""The paper's formats against their definition in plain arithmetic, its pruning against a sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.codecs.paper import TopK

# name: (step, lowest, highest)
FORMATS = {
    "fixed8": (1 / 16, -8.0, 8 - 1 / 16),
    "fixed4": (1 / 2, -4.0, 3.5),
    "ufixed8": (1 / 256, 0.0, 255 / 256),
}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50))
def test_values_are_rounded_and_saturate(name: str, values: list[float]) -> None:
    step, low, high = FORMATS[name]
    codec = get_codec(name)
    y = codec.decode(codec.encode(torch.tensor(values)))
    assert y.tolist() == [min(max(round(v / step) * step, low), high) for v in values]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_values(name: str, dtype: torch.dtype) -> None:
    _, low, high = FORMATS[name]
    codec = get_codec(name)
    y = codec.decode(codec.encode(torch.tensor([math.inf, -math.inf, math.nan, 0.0], dtype=dtype)))
    assert y.tolist() == torch.tensor([high, low, 0.0, 0.0], dtype=dtype).tolist()


def test_bytes() -> None:
    assert [get_codec(n).nbytes((3, 5, 7), torch.float32) for n in FORMATS] == [105, 53, 105]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 30), (1000,), (9,)])
def test_the_largest_magnitudes_survive_and_the_rest_is_zero(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = get_codec("topk10")
    y = codec.decode(codec.encode(x))
    kept = y != 0
    count = x.numel() // 10
    assert kept.sum() == count
    assert torch.equal(y[kept], x[kept])
    if count:
        assert x[kept].abs().min() >= x[~kept].abs().max()
    assert codec.nbytes(shape, dtype) == count * (4 + dtype.itemsize)


def test_of_equal_magnitudes_the_first_are_kept_in_order() -> None:
    x = torch.tensor([1.0, -2, 2, 3, -2, 2, 0, -1, 1, -3])
    values, indices = TopK("t", 0.5).encode(x).tensors
    # Both threes, then the first three of the four twos.
    assert indices.tolist() == [1, 2, 3, 4, 9]
    assert values.tolist() == [-2, 2, 3, -2, -3]


def test_nan_is_kept() -> None:
    x = torch.ones(20)
    x[7] = torch.nan
    codec = get_codec("topk10")
    assert codec.decode(codec.encode(x))[7].isnan()


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_share_is_checked(share: float) -> None:
    with pytest.raises(ValueError, match=rf"\(0, 1\], got {share}"):
        TopK("t", share)
