"""Shortened series keep what the eye looks for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_ds.report.charts import Line, line_chart, short_number
from slimfit_ds.report.series import decimate, log_ticks, nice_ticks, smooth


def test_average_is_that_of_pandas_definition():
    values = np.array([3.0, np.nan, 1.0, 4.0, 1.0])
    keep = 1 - 2 / (4 + 1)
    weights = [keep**age for age in range(5)]
    # Adjusted exponential weights over the finite values; ages count finite values only.
    finite = [3.0, 1.0, 4.0, 1.0]
    expected = [
        sum(w * v for w, v in zip(weights, reversed(finite[: n + 1]), strict=False)) / sum(weights[: n + 1])
        for n in range(4)
    ]
    assert smooth(values, 4) == pytest.approx([expected[0], expected[0], *expected[1:]])


@given(st.lists(st.floats(-1e6, 1e6) | st.just(float("nan")), min_size=1, max_size=400), st.integers(2, 50))
def test_no_spike_is_lost(values, most):
    x, y = np.arange(len(values), dtype=float), np.array(values)
    short_x, short_y = decimate(x, y, most)
    assert len(short_x) <= most + 2 or len(values) <= most
    assert (np.diff(short_x) > 0).all() or len(values) == 1
    assert all(
        y[int(i)] == v or (np.isnan(v) and np.isnan(y[int(i)])) for i, v in zip(short_x, short_y, strict=True)
    )
    if np.isfinite(y).any():
        assert np.nanmax(short_y) == np.nanmax(y)
        assert np.nanmin(short_y) == np.nanmin(y)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_inside_and_even(low, width):
    high = low + width
    if not high > low:
        return
    ticks = nice_ticks(low, high)
    slack = 1e-6 * width + 1e-9 * abs(low)
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    assert 2 <= len(ticks) <= 11
    if len(ticks) > 2:
        assert np.diff(ticks) == pytest.approx(np.diff(ticks)[0], rel=1e-3, abs=1e-9 * abs(low))


def test_powers_of_ten():
    assert log_ticks(1e-3, 10.0) == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10])
    assert log_ticks(1e-9, 1e3) == pytest.approx(
        [1e-9, 1e-6, 1e-3, 1, 1e3][: len(log_ticks(1e-9, 1e3))], rel=1e-6
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.1234, "0.123"), (12.34, "12.3"), (1234, "1234"), (12345, "12.3k"), (2.5e6, "2.5M"),
     (3.4e-5, "3.4e-5"), (999_900, "1M"), (float("nan"), "\N{EN DASH}")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short_number(value) == text


def test_single_points_are_dots_and_gaps_lift_the_pen():
    x = np.arange(5.0)
    chart = line_chart("t", [Line("a", x, np.array([1.0, np.nan, 2.0, 3.0, np.nan]))], x_label="step")
    (line,) = chart.lines
    assert line["path"].count("M") == 2
    assert line["dots"].count("h0") == 1
    assert "from 1 to 3" in chart.summary


def test_no_finite_value_is_no_chart():
    assert line_chart("t", [Line("a", np.arange(3.0), np.full(3, np.nan))], x_label="step") is None


def test_spikes_of_a_faint_line_do_not_flatten_the_others():
    x = np.arange(200.0)
    noisy = np.ones(200)
    noisy[7] = 1e6
    lines = [Line("raw", x, noisy, faint=True), Line("even", x, np.linspace(1, 2, 200))]
    chart = line_chart("t", lines, x_label="step")
    assert max(float(text) for _, text in chart.y_ticks) <= 2.2
