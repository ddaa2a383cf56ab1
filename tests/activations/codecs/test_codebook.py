"""The Lloyd-Max codebooks against published tables and independent integrals."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, stats

from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.codecs.codebook import lloyd_max_normal

# J. Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table I.
THRESHOLDS = {1: [], 2: [0.9816], 4: [0.2582, 0.5224, 0.7996, 1.099, 1.437, 1.844, 2.401]}
LEVELS = {
    1: [0.7980],
    2: [0.4528, 1.510],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
MSE = {1: 0.3634, 2: 0.1175, 4: 0.009497}


def _error(thresholds: list[float], levels: list[float]) -> float:
    """Mean squared error on N(0, 1), by numerical integration over the positive half."""
    edges = [0.0, *thresholds, math.inf]
    return 2 * sum(
        integrate.quad(lambda x, level=level: (x - level) ** 2 * stats.norm.pdf(x), a, b)[0]
        for a, b, level in zip(edges, edges[1:], levels, strict=False)
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_and_thresholds_are_the_published_ones(bits: int) -> None:
    cells = lloyd_max_normal(bits)
    half = 1 << (bits - 1)
    # bf16 has 8 significant bits; the published table 4 digits.
    assert cells.thresholds == pytest.approx(THRESHOLDS[bits], rel=2**-8)
    assert cells.levels[:half] == pytest.approx(LEVELS[bits], rel=3e-3)
    assert cells.levels[half:] == tuple(-level for level in cells.levels[:half])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_mean_squared_error_is_the_optimum(bits: int) -> None:
    cells = lloyd_max_normal(bits)
    thresholds, levels = list(cells.thresholds), list(cells.levels[: 1 << (bits - 1)])
    error = _error(thresholds, levels)
    assert error == pytest.approx(MSE[bits], rel=1e-3)
    for i in range(len(levels)):
        for change in (-0.02, 0.02):
            assert _error(thresholds, [v + change * (i == j) for j, v in enumerate(levels)]) > error
    for i in range(len(thresholds)):
        for change in (-0.03, 0.03):
            assert _error([t + change * (i == j) for j, t in enumerate(thresholds)], levels) > error


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_measured_error_on_normal_data(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(1 << 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    codec = get_codec(f"lm{bits}")
    error = (codec.decode(codec.encode(x)).double() - x.double()).square().mean().item()
    assert error == pytest.approx(MSE[bits], rel=0.01)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_value_goes_to_its_nearest_level(bits: int) -> None:
    codec = get_codec(f"lm{bits}")
    levels = torch.tensor(lloyd_max_normal(bits).levels, dtype=torch.float64)
    x = torch.linspace(-4, 4, 40_001)
    y = codec.decode(codec.encode(x)).double()
    best = (x.double()[:, None] - levels).abs().amin(1)
    # A threshold rounded to bf16 lies up to 2^-9 of itself from the middle of its levels.
    assert ((y - x.double()).abs() <= best + 2 * 2.5 * 2**-9).all()


def test_no_scale_is_stored() -> None:
    for bits in (1, 2, 4):
        assert get_codec(f"lm{bits}").nbytes((16, 64), torch.bfloat16) == 16 * 64 * bits // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_saturate(dtype: torch.dtype) -> None:
    x = torch.tensor([math.inf, -math.inf, 1e4, -1e4, 0.0, -0.0], dtype=dtype)
    y = get_codec("lm4").decode(get_codec("lm4").encode(x)).double()
    torch.testing.assert_close(
        y, torch.tensor([2.733, -2.733, 2.733, -2.733, 0.1284, -0.1284]).double(), rtol=0.01, atol=0
    )
    assert not get_codec("lm4").decode(get_codec("lm4").encode(x * math.nan)).isnan().any()
