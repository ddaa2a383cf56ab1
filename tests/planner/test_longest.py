"""The longest sequence that fits, against functions of which it is known."""

from __future__ import annotations

import math

import pytest

from slimfit_ds.planner.longest import longest_sequence


@pytest.mark.parametrize(
    ("needs", "longest"),
    [
        (lambda tokens: 3_000_000 + 70 * tokens, (10**9 - 3_000_000) / 70),
        (lambda tokens: max(900_000_000, 2_000 * tokens), 500_000),
        (lambda tokens: 1_000_000 + tokens**2 // 100, math.sqrt(99.9e9)),
        (lambda tokens: 400_000 * tokens, 2_500),
    ],
)
def test_found_within_two_per_cent_in_few_steps(needs, longest):
    asked = []

    def counting(tokens: int) -> int:
        asked.append(tokens)
        return needs(tokens)

    found = longest_sequence(counting, 10**9)
    assert needs(found) <= 10**9
    assert longest - max(0.02 * longest, 128) - 64 <= found <= longest
    assert len(asked) <= 16
    assert len(set(asked)) == len(asked)


def test_nothing_fits_or_is_known():
    assert longest_sequence(lambda tokens: 2 * 10**9, 10**9) == 0
    assert longest_sequence(lambda tokens: None, 10**9) == 0
    assert longest_sequence(lambda tokens: 1, 10**9) >= 1 << 23
