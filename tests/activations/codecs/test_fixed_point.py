"""The paper's formats against their definition in plain arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfit_ds.activations.codecs import get_codec

# name: (step, lowest, highest)
FORMATS = {
    "fixed8": (1 / 16, -8.0, 8 - 1 / 16),
    "fixed4": (1 / 2, -4.0, 3.5),
    "ufixed8": (1 / 256, 0.0, 255 / 256),
}


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=50))
def test_values_are_rounded_and_saturate(name: str, values: list[float]) -> None:
    step, low, high = FORMATS[name]
    codec = get_codec(name)
    x = torch.tensor(values)
    y = codec.decode(codec.encode(x))
    expected = [min(max(round(v / step) * step, low), high) for v in values]
    assert y.tolist() == expected


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_values(name: str, dtype: torch.dtype) -> None:
    _, low, high = FORMATS[name]
    y = get_codec(name).decode(
        get_codec(name).encode(torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype))
    )
    assert y.tolist() == torch.tensor([high, low, 0.0], dtype=dtype).tolist()


def test_bytes() -> None:
    shape = (3, 5, 7)
    assert [get_codec(n).nbytes(shape, torch.float32) for n in FORMATS] == [105, 53, 105]


def test_probabilities_contain_zero() -> None:
    assert get_codec("ufixed8").decode(get_codec("ufixed8").encode(torch.zeros(4))).tolist() == [0, 0, 0, 0]
