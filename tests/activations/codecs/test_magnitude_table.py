"""Table look-ups against comparisons in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimfit_ds.activations.codecs.magnitude_table import MagnitudeCells, MagnitudeTableCodec

SIGNED = MagnitudeCells(2, (1.0,), (0.5, 2.0, -0.5, -2.0))
UNSIGNED = MagnitudeCells(2, (0.25, 1.0, 3.0), (0.0, 0.5, 2.0, 4.0), signed=False)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40))
def test_cells_are_exact_for_fp32(values: list[float]) -> None:
    """Truncating to 16 bits moves no value across a threshold, not even the nearest neighbours of one."""
    near = [v for t in (0.25, 1.0, 3.0) for v in (t, -t)]
    x = torch.tensor([*values, *near], dtype=torch.float32)
    x = torch.cat([x, x.nextafter(torch.tensor(9.0)), x.nextafter(torch.tensor(-9.0))])
    signed = MagnitudeTableCodec("s", SIGNED)
    large = x.double().abs() >= 1
    expected = torch.where(large, 2.0, 0.5) * torch.where(x.signbit(), -1.0, 1.0)
    assert torch.equal(signed.decode(signed.encode(x)), expected.float())
    unsigned = MagnitudeTableCodec("u", UNSIGNED)
    code = sum((x.double() >= t).long() for t in (0.25, 1.0, 3.0))
    assert torch.equal(unsigned.decode(unsigned.encode(x)), torch.tensor(UNSIGNED.levels)[code])


def test_intervals_may_share_a_cell() -> None:
    cells = MagnitudeCells(2, (0.25, 1.0, 3.0), (0.5, 2.0, -0.5, -2.0), cells=(0, 1, 0, 1))
    codec = MagnitudeTableCodec("shared", cells)
    x = torch.tensor([0.1, 0.5, 2.0, 5.0, -0.1, -0.5, -2.0, -5.0])
    assert codec.decode(codec.encode(x)).tolist() == [0.5, 2.0, 0.5, 2.0, -0.5, -2.0, -0.5, -2.0]


def test_every_bf16_number_falls_into_its_cell() -> None:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[~x.isnan()]
    y = MagnitudeTableCodec("s", SIGNED).decode(MagnitudeTableCodec("s", SIGNED).encode(x))
    expected = torch.where(x.abs() >= 1, 2.0, 0.5) * torch.where(x.signbit(), -1.0, 1.0)
    assert torch.equal(y.float(), expected.float())


@pytest.mark.parametrize(
    ("thresholds", "levels"),
    [((1.0, 2.0), (0.0,) * 4), ((1.0,), (0.0,) * 3), ((-1.0,), (0.0,) * 4)],
)
def test_wrong_cells_are_refused(thresholds: tuple[float, ...], levels: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="thresholds"):
        MagnitudeCells(2, thresholds, levels)
