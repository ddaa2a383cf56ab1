"""Absmax integers against bounds and grids computed in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slimfit_ds.activations.codecs import absmax, get_codec

HALF_WIDTH = {"int8": 127, "int6": 31, "int4": 7}
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
)
def test_error_is_at_most_half_a_step(
    name: str, numel: int, group: int, dtype: torch.dtype, spread: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator) * torch.exp(spread * torch.randn(numel, generator=generator))
    x = x.clamp(-6e4, 6e4).to(dtype)
    codec = get_codec(name, group=group)
    y = codec.decode(codec.encode(x))
    step = _group_peaks(x, group) / HALF_WIDTH[name] * (1 + 2**-7)
    bound = 0.5 * step + EPSILON[dtype] * y.double().abs() + 1e-7 * step
    # fp16's own smallest step
    bound += 2.0**-25 if dtype == torch.float16 else 2.0**-100
    assert ((y.double() - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("name", HALF_WIDTH)
def test_decoded_values_lie_on_the_integer_grid(name: str) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    codec = get_codec(name, group=64)
    y = codec.decode(codec.encode(x)).double().view(-1, 64)
    half = HALF_WIDTH[name]
    for row, peak in zip(y, x.double().view(-1, 64).abs().amax(1), strict=True):
        # The step is the smallest bf16 number that is at least absmax / half_width.
        mantissa, exponent = math.frexp(peak.item() / half)
        step = math.ldexp(math.ceil(mantissa * 256) / 256, exponent)
        multiples = row / step
        assert torch.equal(multiples, multiples.round())
        assert row.abs().max() <= half * step


@pytest.mark.parametrize("name", HALF_WIDTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_groups_of_zeros_and_tiny_values(name: str, dtype: torch.dtype) -> None:
    codec = get_codec(name, group=32)
    x = torch.zeros(128, dtype=dtype)
    x[32:64] = 2.0**-110
    x[64:96] = 1e-28
    y = codec.decode(codec.encode(x))
    assert torch.equal(y[:64], torch.zeros(64, dtype=dtype))
    torch.testing.assert_close(y[64:96], x[64:96], rtol=0.02, atol=0)
    assert torch.equal(y[96:], torch.zeros(32, dtype=dtype))


@pytest.mark.parametrize("name", HALF_WIDTH)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", list(EPSILON))
def test_a_non_finite_element_turns_its_group_into_nan(name: str, bad: float, dtype: torch.dtype) -> None:
    codec = get_codec(name, group=32)
    x = torch.rand(100, dtype=dtype) + 0.5
    expected = codec.decode(codec.encode(x))
    x[40] = bad
    y = codec.decode(codec.encode(x))
    assert y[32:64].isnan().all()
    assert torch.equal(y[:32], expected[:32])
    assert torch.equal(y[64:], expected[64:])


@pytest.mark.parametrize("name", HALF_WIDTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_parts_give_the_bits_of_the_whole(
    name: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = get_codec(name, group=32)
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = codec.encode(x)
    assert codec.row_parts(7, 96) == [(0, 7)]
    monkeypatch.setattr(absmax, "_PART", rows * 96)
    bounds = codec.row_parts(7, 96)
    assert bounds[0] == (0, rows)
    assert bounds[-1][1] == 7
    parts = codec.encode_parts(lambda i: x[slice(*bounds[i])], len(bounds), x.shape)
    assert parts.shape == whole.shape
    assert all(torch.equal(a, b) for a, b in zip(parts.tensors, whole.tensors, strict=True))
    decoded = codec.decode(whole)
    for start, stop in bounds:
        assert torch.equal(codec.decode(codec.part(whole, start, stop)), decoded[start:stop])
    assert codec.row_parts(7, 40) == [(0, 7)], "groups cross rows"
