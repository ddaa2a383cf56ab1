"""The ladder keeps what the user fixed; the search against a made-up memory model that is searched exhaustively."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.memory.tracker import MemoryReport
from slimfit_ds.planner.search import find_setting, ladder, merged
from slimfit_ds.planner.simulate import Estimate
from slimfit_ds.planner.strategies import GRADIENT_ERROR
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
    # A small model cannot keep the leanest rates: then the leanest that it can keep counts.
    possible = [peak for peak in peaks if peak is not None]
    if not possible:
        with pytest.raises(ConfigError, match="boom"):
            find_setting(budget, WORKLOAD, fake_run(peaks))
        return
    choice = find_setting(budget, WORKLOAD, fake_run(peaks))
    if possible[-1] <= budget:
        assert choice.setting is not None
    if choice.setting is not None:
        assert choice.setting.estimate.peak <= budget


@given(
    st.lists(st.one_of(st.none(), st.integers(1, 1000)), min_size=STEPS, max_size=STEPS), st.integers(0, 1100)
)
def test_what_is_chosen_is_the_same_with_the_leanest_beside(peaks, budget):
    with ThreadPoolExecutor(1) as beside:
        if not any(peaks):
            return
        together = find_setting(budget, WORKLOAD, fake_run(peaks), beside=beside)
    if peaks[-1] is not None and peaks[-1] <= budget:
        assert together == find_setting(budget, WORKLOAD, fake_run(peaks))
    assert together.setting is None or together.setting.estimate.peak <= budget


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
    assert found.setting.label == "balanced, 90% frozen, loss in chunks"
    assert find_setting(300, WORKLOAD, run).setting is None


def test_every_rung_is_a_valid_block():
    for rung in ladder():
        block = merged(None, rung, ("embed.weight",))
        config = SlimFitConfig.parse(block)
        assert config.activations.preset == rung.preset
        assert rung.preset in GRADIENT_ERROR


def test_fixed_values_survive_and_rungs_stay_distinct():
    fixed = {"freeze": {"rate": 0.5, "policy": "random"}, "activations": "ultra", "memory_budget": "1GB"}
    rungs = ladder(fixed)
    assert 1 <= len(rungs) < len(ladder())
    seen = []
    for rung in rungs:
        block = merged(fixed, rung, ("embed.weight",))
        config = SlimFitConfig.parse(block)
        assert config.freeze.rate == 0.5
        assert config.freeze.policy == "random"
        assert config.activations.preset == "ultra"
        assert config.memory_budget is None
        assert block not in seen
        seen.append(block)


def test_stage_3_has_no_8_bit_states_but_streams():
    for rung in ladder(stage=3):
        assert "precision" not in merged(None, rung)["optimizer_states"]
    assert merged(None, ladder(stage=3)[-1])["frozen_weights"] == {"live": "host"}


def test_embeddings_are_named_or_left_out():
    blocks = [merged(None, rung, ("a.weight", "b.weight")) for rung in ladder()]
    assert any(block["freeze"].get("never_active") == ["a.weight", "b.weight"] for block in blocks)
    assert all("never_active" not in merged(None, rung)["freeze"] for rung in ladder())


def test_only_a_language_model_gets_its_loss_in_chunks():
    plain, language = ladder(), ladder(language_model=True)
    assert all("chunk_loss_tokens" not in rung.changes["activations"] for rung in plain)
    assert len(language) == len(plain) + 1
    chunked = [rung for rung in language if "chunk_loss_tokens" in rung.changes["activations"]]
    assert chunked == language[-len(chunked) :]  # once it is in chunks it stays so
    assert chunked[0].changes["activations"]["preset"] == "balanced"
    assert all("loss in chunks" in rung.label for rung in chunked)
    # Without them the settings are those of any model.
    assert {rung.label.replace(", loss in chunks", "") for rung in language} == {r.label for r in plain}
    assert SlimFitConfig.parse(merged(None, chunked[0])).activations.chunk_loss_tokens == 1024


def test_a_stated_chunk_of_the_loss_is_kept():
    fixed = {"activations": {"chunk_loss_tokens": 256}}
    for rung in ladder(fixed, language_model=True):
        assert merged(fixed, rung)["activations"]["chunk_loss_tokens"] == 256


def test_only_a_policy_that_chooses_has_states_to_send_to_the_host():
    assert all("inactive" not in rung.changes["optimizer_states"] for rung in ladder())
    paper = ladder({"freeze": {"policy": "ils"}})
    assert {"device", "host"} == {rung.changes["optimizer_states"]["inactive"] for rung in paper}
    # Whole layers that take turns are not streamed.
    assert not any(rung.changes["frozen_weights"] for rung in paper)
    assert len(paper) > len([rung for rung in ladder() if not rung.changes["frozen_weights"]])


def test_resident_blocks_fill_the_budget_and_a_stated_number_is_kept():
    """Of a pretended model whose blocks take 10 each, and everything else 25."""
    asked = []

    def run(workload, strategy):
        weights = strategy.slimfit.get("frozen_weights", {})
        asked.append(weights.get("resident", 0))
        streams = weights.get("live") == "host"
        peak = 25 + 10 * weights.get("resident", 0) if streams else 1000
        return Estimate(
            strategy, MemoryReport(peak=peak), blocks=32 if streams else 0, block=8 if streams else 0
        )

    choice = find_setting(100, WORKLOAD, run)
    assert choice.setting.estimate.peak == 95
    assert choice.setting.block["frozen_weights"] == {"live": "host", "resident": 7}
    assert asked[-1] == 7
    assert "but 7 of 32 blocks" in choice.setting.label
    stated = find_setting(100, WORKLOAD, run, {"frozen_weights": {"live": "host", "resident": 2}})
    assert stated.setting.block["frozen_weights"]["resident"] == 2


def test_a_width_of_units_that_all_train_says_what_is_frozen():
    fixed = {"freeze": {"width": 0.25}}
    for rung in ladder(fixed):
        freeze = SlimFitConfig.parse(merged(fixed, rung)).freeze
        assert (freeze.width, freeze.rate) == (0.25, 0.75)
    chosen = {"freeze": {"policy": "ils", "width": 0.25}}
    assert {SlimFitConfig.parse(merged(chosen, rung)).freeze.rate for rung in ladder(chosen)} == {
        0.9,
        0.95,
        0.98,
    }
