"""Bit packing against shifts of Python integers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfit_ds.activations.codecs.packing import byte_table, gather_bytes, pack, packed_bytes


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@settings(max_examples=50, deadline=None)
@given(data=st.data(), start=st.integers(0, 7))
def test_codes_lie_lowest_first(bits: int, data: st.DataObject, start: int) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=70))
    per_byte = 8 // bits
    expected = [
        sum(code << (bits * k) for k, code in enumerate(codes[i : i + per_byte]))
        for i in range(0, len(codes), per_byte)
    ]
    # A slice that starts anywhere in a larger tensor.
    tensor = torch.tensor([0] * start + codes, dtype=torch.uint8)[start:]
    packed = torch.full((len(expected),), 255, dtype=torch.uint8)
    assert bits == 2 or packed_bytes(len(codes), bits) == len(expected)
    pack(tensor, bits, packed)
    assert packed.tolist() == expected


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("start", [0, 1, 2, 8])
def test_bytes_become_their_levels(bits: int, dtype: torch.dtype, start: int) -> None:
    levels = torch.randn(1 << bits).to(dtype)
    packed = torch.randint(0, 256, (37,), dtype=torch.uint8)
    codes = [(byte >> shift) & (2**bits - 1) for byte in packed.tolist() for shift in range(0, 8, bits)]
    out = torch.zeros(start + len(codes), dtype=dtype)
    gather_bytes(packed, byte_table(levels, bits), out[start:])
    assert out[start:].tolist() == [levels[c].item() for c in codes]
    assert (out[:start] == 0).all()
