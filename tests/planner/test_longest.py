"""The longest sequence that fits, against functions of which it is known."""

from __future__ import annotations

import math

import pytest

from slimfit_ds.memory.tracker import MemoryReport
from slimfit_ds.planner.longest import longest_rows, longest_sequence, longest_table
from slimfit_ds.planner.search import label_of
from slimfit_ds.planner.simulate import Estimate
from slimfit_ds.planner.strategies import Strategy
from slimfit_ds.planner.workload import Workload


@pytest.mark.parametrize(
    ("needs", "longest"),
    [
        (lambda tokens: 3_000_000 + 70 * tokens, (10**9 - 3_000_000) / 70),
        (lambda tokens: max(900_000_000, 2_000 * tokens), 500_000),
        (lambda tokens: 1_000_000 + tokens**2 // 100, math.sqrt(99.9e9)),
        (lambda tokens: 400_000 * tokens, 2_500),
        (lambda tokens: 900_000_000 + 90_000 * tokens, 1_111),
        (lambda tokens: max(500_000_000 + 9_000 * tokens, 600_000_000 + 1_000 * tokens), 55_555),
    ],
)
def test_found_within_two_per_cent_in_few_steps(needs, longest):
    asked = []

    def counting(tokens: int) -> int:
        asked.append(tokens)
        return needs(tokens)

    found = longest_sequence(counting, 10**9)
    assert needs(found) <= 10**9
    assert longest - max(0.02 * longest, 512) - 64 <= found <= longest
    assert len(asked) <= 12
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize(
    ("start", "each", "times"), [(3 * 10**9, 45_000, 3), (15 * 10**8, 400, 3), (17 * 10**9, 10**6, 2)]
)
def test_what_grows_evenly_is_found_in_three_steps(start, each, times):
    asked = []

    def needs(tokens: int) -> int:
        asked.append(tokens)
        return start + each * tokens

    budget = 16 * 10**9
    found = longest_sequence(needs, budget)
    assert found >= min(0.98 * (budget - start) / each, 1 << 23)
    assert len(asked) == times


def test_nothing_fits_or_is_known():
    assert longest_sequence(lambda tokens: 2 * 10**9, 10**9) == 0
    assert longest_sequence(lambda tokens: None, 10**9) == 0
    assert longest_sequence(lambda tokens: 1, 10**9) >= 1 << 23


def test_a_row_for_each_method_with_what_it_keeps_on_the_host():
    def run(workload: Workload, strategy: Strategy) -> Estimate:
        block = strategy.slimfit
        if block is None:
            return Estimate(strategy, MemoryReport(peak=500 * workload.seq))
        assert label_of(block)
        kept = 100 if block["activations"].get("offload") else 400
        return Estimate(strategy, MemoryReport(peak=kept * workload.seq, saved_activations_host=workload.seq))

    facts = {"loss_in_chunks": True, "linear": 0, "in_blocks": 0, "parameters": 0}
    workload = Workload({"model_type": "llama"}, task="causal_lm")
    rows = list(longest_rows(run, workload, facts, 0, 10**9))
    lengths = [row.tokens for row in rows]
    assert lengths[0] == pytest.approx(2_000_000, rel=0.02)
    assert lengths[1] == 0  # nothing to pack
    assert lengths[2:] == pytest.approx([2_500_000, 10_000_000, 10_000_000, 10_000_000], rel=0.02)
    assert [row.host for row in rows[2:]] == lengths[2:]
    assert longest_table(rows, "a title").row_count == 6
