"""Absmax integers against bounds and grids computed in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfit_ds.activations.codecs import get_codec

HALF_WIDTH = {"int8": 127, "int6": 31, "int5": 15, "int4": 7, "int2": 1.5, "uint8": 255}
# Relative rounding error of a result in each dtype.
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 0.0}


def _group_peaks(x: Tensor, group: int) -> Tensor:
    """float64 absmax of the group that each element of the flat `x` belongs to."""
    values = x.double().abs().flatten().numpy()
    peaks = [values[i : i + group].max() for i in range(0, len(values), group)]
    return torch.from_numpy(np.repeat(peaks, group)[: len(values)])


@pytest.mark.parametrize("name", HALF_WIDTH)
@settings(max_examples=40, deadline=None)
@given(
    numel=st.integers(1, 300),
    group=st.sampled_from([8, 24, 32, 64]),
    dtype=st.sampled_from(list(EPSILON)),
    spread=st.floats(0, 6),
    seed=st.integers(0, 1000),
    stochastic=st.booleans(),
)
def test_error_is_at_most_half_a_step(
    name: str, numel: int, group: int, dtype: torch.dtype, spread: float, seed: int, stochastic: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * torch.exp(spread * torch.randn(numel, generator=generator))
    x = (x.abs() if name == "uint8" else x).clamp(-6e4, 6e4).to(dtype)
    codec = get_codec(name, group=group, rounding="stochastic" if stochastic else "nearest")
    y = codec.decode(codec.encode(x, generator=generator))
    step = _group_peaks(x, group) / HALF_WIDTH[name] * (1 + 2**-7)
    bound = step * (1 if stochastic else 0.5) + EPSILON[dtype] * y.double().abs() + 1e-7 * step
    # fp16's own smallest step
    bound += 2.0**-25 if dtype == torch.float16 else 2.0**-100
    assert ((y.double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("name", HALF_WIDTH)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_decoded_values_lie_on_the_integer_grid(name: str, rounding: str) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    x = x.abs() if name == "uint8" else x
    codec = get_codec(name, group=64, rounding=rounding)
    y = codec.decode(codec.encode(x)).double().view(-1, 64)
    half = HALF_WIDTH[name]
    offset = half % 1
    for row, peak in zip(y, x.double().view(-1, 64).abs().amax(1), strict=True):
        # The step is the smallest bf16 number that is at least absmax / half_width.
        mantissa, exponent = math.frexp(peak.item() / half)
        step = math.ldexp(math.ceil(mantissa * 256) / 256, exponent)
        multiples = row / step - offset
        assert torch.equal(multiples, multiples.round())
        assert row.abs().max() <= half * step


@pytest.mark.parametrize(
    ("name", "group"), [("int8", 64), ("int6", 64), ("int5", 64), ("int4", 32), ("int2", 32), ("uint8", 64)]
)
def test_stochastic_rounding_is_unbiased(name: str, group: int) -> None:
    draws = 1500
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2 * group, generator=generator)
    x = x.abs() if name == "uint8" else x
    codec = get_codec(name, group=group, rounding="stochastic")
    total = torch.zeros(len(x), dtype=torch.float64)
    for _ in range(draws):
        total += codec.decode(codec.encode(x, generator=generator)).double()
    step = _group_peaks(x, group) / HALF_WIDTH[name] * (1 + 2**-7)
    # A value between two levels has at most half a step of deviation; 5 sigma over 256 values.
    bound = 5 * step / 2 / math.sqrt(draws) + step * 2**-15
    assert ((total / draws - x.double()).abs() <= bound).all()
    assert codec.unbiased
    assert not get_codec(name, group=group, rounding="nearest").unbiased


def test_nearest_rounding_at_two_bits_is_biased_where_stochastic_is_not() -> None:
    """What the default of int2 rests on: the sum of many rounded values."""
    x = torch.full((64 * 32,), 0.1)
    x[::32] = 1.0
    exact = x.double().sum()
    sums = {}
    for rounding in ("nearest", "stochastic"):
        codec = get_codec("int2", rounding=rounding)
        sums[rounding] = codec.decode(codec.encode(x)).double().sum()
    assert abs(sums["stochastic"] - exact) < 0.2 * abs(sums["nearest"] - exact)


def test_default_rounding_by_width() -> None:
    x = torch.randn(64, 64)
    for name in ("int8", "int4", "uint8"):
        assert get_codec(name).rounding == "nearest"
    codec = get_codec("int2")
    assert any(not torch.equal(codec.encode(x).tensors[0], codec.encode(x).tensors[0]) for _ in range(3))


def test_draws_repeat_with_the_generator() -> None:
    x = torch.randn(33, 65)
    codec = get_codec("int2")
    codes = [codec.encode(x, generator=torch.Generator().manual_seed(seed)).tensors[0] for seed in (1, 1, 2)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("name", HALF_WIDTH)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_zeros_and_tiny_values(name: str, rounding: str, dtype: torch.dtype) -> None:
    codec = get_codec(name, group=32, rounding=rounding)
    x = torch.zeros(128, dtype=dtype)
    x[32:64] = 2.0**-110
    x[64:96] = 1e-28
    y = codec.decode(codec.encode(x))
    assert torch.equal(y[:64], torch.zeros(64, dtype=dtype))
    # Stochastic rounding may take the next level below.
    rtol = 0.02 if rounding == "nearest" else 1 / HALF_WIDTH[name] + 0.02
    torch.testing.assert_close(y[64:96], x[64:96], rtol=rtol, atol=0)
    assert torch.equal(y[96:], torch.zeros(32, dtype=dtype))


@pytest.mark.parametrize("name", HALF_WIDTH)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", list(EPSILON))
def test_a_non_finite_element_turns_its_group_into_nan(
    name: str, rounding: str, bad: float, dtype: torch.dtype
) -> None:
    codec = get_codec(name, group=32, rounding=rounding)
    x = torch.rand(100, dtype=dtype) + 0.5
    expected = codec.decode(codec.encode(x, generator=torch.Generator().manual_seed(1)))
    x[40] = bad
    y = codec.decode(codec.encode(x, generator=torch.Generator().manual_seed(1)))
    assert y[32:64].isnan().all()
    assert torch.equal(y[:32], expected[:32])
    assert torch.equal(y[64:], expected[64:])


@pytest.mark.parametrize("name", ["int8", "int4", "uint8"])
def test_zero_is_exact(name: str) -> None:
    """Softmax probabilities of masked positions must stay zero."""
    x = torch.rand(64, 64) * (torch.rand(64, 64) > 0.5)
    y = get_codec(name).decode(get_codec(name).encode(x))
    assert torch.equal(y == 0, (y == 0) | (x == 0))
    assert (y[x == 0] == 0).all()


def test_large_magnitudes_do_not_overflow() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
        x[1] = -x[0]
        for name in ("int8", "int4", "int2"):
            y = get_codec(name, rounding="nearest").decode(get_codec(name, rounding="nearest").encode(x))
            # The step is rounded up, so the largest number of a format may become its infinity, never NaN.
            assert not y.isnan().any()


@pytest.mark.parametrize(
    ("name", "bytes_per_element"), [("int8", 1 + 2 / 64), ("int4", 0.5 + 2 / 32), ("int2", 0.25 + 2 / 32)]
)
def test_bytes_per_element(name: str, bytes_per_element: float) -> None:
    assert get_codec(name).bits_per_element() / 8 == bytes_per_element
    assert get_codec(name).nbytes((2, 384, 768), torch.bfloat16) == 2 * 384 * 768 * bytes_per_element
