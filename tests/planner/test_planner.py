"""The search over the ladder, against a made-up memory model that is searched exhaustively."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_ds.errors import ConfigError
from slimfit_ds.memory.tracker import MemoryReport
from slimfit_ds.planner.estimator import Estimate
from slimfit_ds.planner.ladder import ladder
from slimfit_ds.planner.planner import find_setting
from slimfit_ds.planner.workload import Workload

WORKLOAD = Workload("bert-base-uncased")
STEPS = len(ladder())


def fake_run(peaks):
    def run(workload, strategy):
        peak = peaks[int(strategy.name.rpartition("-")[2])]
        if peak is None:
            return Estimate(strategy, None, "boom")
        return Estimate(strategy, MemoryReport(peak=peak))

    return run


@given(st.lists(st.integers(1, 1000), min_size=STEPS, max_size=STEPS), st.integers(0, 1100))
def test_the_fastest_that_fits_when_memory_falls_along_the_ladder(values, budget):
    peaks = sorted(values, reverse=True)
    choice = find_setting(budget, WORKLOAD, fake_run(peaks))
    fitting = [i for i, peak in enumerate(peaks) if peak <= budget]
    if not fitting:
        assert choice.setting is None
        assert choice.smallest.estimate.peak == min(peaks)
        assert "nothing fits" in choice.reason(budget)
    else:
        assert choice.setting is not None
        assert choice.setting.label == ladder()[fitting[0]].label
        assert choice.setting.estimate.peak <= budget
    assert len(choice.tried) <= 6


@given(
    st.lists(st.one_of(st.none(), st.integers(1, 1000)), min_size=STEPS, max_size=STEPS), st.integers(0, 1100)
)
def test_what_is_chosen_always_fits(peaks, budget):
    # Where the leanest cannot be simulated, nothing else was tried: that is an error of its own.
    if peaks[-1] is None:
        with pytest.raises(ConfigError, match="boom"):
            find_setting(budget, WORKLOAD, fake_run(peaks))
        return
    choice = find_setting(budget, WORKLOAD, fake_run(peaks))
    if choice.setting is not None:
        assert choice.setting.estimate.peak <= budget


def test_no_simulation_at_all_is_an_error():
    with pytest.raises(ConfigError, match="boom"):
        find_setting(10, WORKLOAD, fake_run([None] * STEPS))


def test_a_language_model_whose_logits_are_the_peak_keeps_a_fast_setting():
    """Logits of 600 in all but the settings with the loss in chunks, which take 10."""

    def run(workload, strategy):
        at = int(strategy.name.rpartition("-")[2])
        logits = 10 if strategy.slimfit["activations"].get("chunk_loss_tokens") else 600
        return Estimate(strategy, MemoryReport(peak=200 - at + logits))

    found = find_setting(300, WORKLOAD, run, language_model=True)
    assert found.setting is not None
    assert found.setting.label == "balanced, 90% frozen, states on host, loss in chunks"
    assert find_setting(300, WORKLOAD, run).setting is None
