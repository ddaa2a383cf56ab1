"""Each policy against selections worked out by hand."""

from __future__ import annotations

import json

import pytest

from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.policies import POLICIES, PRIMING, Budget, Selection
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.trainable.units import ParameterRoles, Unit

# embedding; two blocks of three; head.
NAMES = ["embed", *(f"layers.{block}.{part}" for block in range(2) for part in "qvf"), "head"]
UNITS = tuple(Unit(f"{name}.weight", "linear", 10 * (i + 1), i) for i, name in enumerate(NAMES))


def selection(active: int, step: int = 0, interval: int = 1, units=UNITS, **changes) -> Selection:
    """What the schedule would ask, with room for `active` units."""
    values = {
        "units": units,
        "step": step,
        "choice": step // interval,
        "budget": Budget((1,) * len(units), active),
        "candidates": tuple(range(len(units))),
        "always": frozenset(),
        "seed": 0,
    }
    return Selection(**{**values, **changes})


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_state_survives_json_and_sets_keep_the_budget(name):
    policy = POLICIES[name]
    state = policy.init(len(UNITS), 0)
    for step in range(40):
        asked = selection(3, step, always=frozenset({7}), candidates=(0, 1, 2, 3, 5, 6))
        chosen = policy.select(state, asked)
        assert 7 in chosen
        assert 4 not in chosen, "never active"
        assert policy.trains_all or len(chosen) <= 3
        assert policy.select(json.loads(json.dumps(state)), asked) == chosen
        state = policy.observe(state, {layer: 1.0 / (1 + layer + step) for layer in chosen})


@pytest.mark.parametrize("name", ["ils", "badam", "far", "bsr"])
def test_each_layer_trains_in_the_first_cycle(name):
    schedule = FreezeSchedule(ParameterRoles(UNITS), FreezeConfig(policy=name, rate=0.75))
    seen: set[int] = set()
    for _ in range(4):
        seen |= schedule.active
        schedule.advance(dict.fromkeys(schedule.active, 0.5))
    assert seen == set(range(8))


def test_lisa_trains_the_outside_and_one_block():
    drawn = set()
    for step in range(20):
        chosen = POLICIES["lisa"].select({}, selection(5, step))
        assert {0, 7} < chosen
        drawn.add(chosen - {0, 7})
    assert drawn == {frozenset({1, 2, 3}), frozenset({4, 5, 6})}


def test_lisa_gives_the_head_its_place_first():
    assert POLICIES["lisa"].select({}, selection(1)) == {7}
    assert POLICIES["lisa"].select({}, selection(2)) == {0, 7}
    # An embedding that costs more than the budget is left out, and the rest goes to a block.
    budget = Budget((9, 1, 1, 1, 1, 1, 1, 1), 4)
    assert POLICIES["lisa"].select({}, selection(0, budget=budget)) in ({1, 2, 3, 7}, {4, 5, 6, 7})


def test_badam_cycles_through_neighbours():
    order = [POLICIES["badam"].select({}, selection(3, step)) for step in range(9)]
    groups = {frozenset({0, 1, 2}), frozenset({3, 4, 5}), frozenset({6, 7})}
    for cycle in (0, 3, 6):
        assert set(order[cycle : cycle + 3]) == groups
    assert len({tuple(order[cycle : cycle + 3]) for cycle in (0, 3, 6)}) > 1, "shuffled anew"


def test_badam_holds_a_group_for_an_interval():
    schedule = FreezeSchedule(ParameterRoles(UNITS), FreezeConfig(policy="badam", rate=0.7, interval=4))
    sets = [schedule.active, *(schedule.advance({}) for _ in range(11))]
    assert [len(set(sets[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1]
    assert frozenset().union(*sets) == frozenset(range(8))


def test_badam_cuts_by_cost_and_leaves_out_what_never_fits():
    budget = Budget((5, 1, 2, 2, 1, 9, 1, 3), 4)
    chosen = [POLICIES["badam"].select({}, selection(0, step, budget=budget)) for step in range(3)]
    # 0 (cost 5) and 5 (cost 9) never fit; 1+2 | 3+4+6 | 7.
    assert set(chosen) == {frozenset({1, 2}), frozenset({3, 4, 6}), frozenset({7})}


@pytest.mark.parametrize(("name", "expected"), [("far", {2, 5}), ("bsr", {4, 7})])
def test_choice_made_once_after_priming(name, expected):
    schedule = FreezeSchedule(ParameterRoles(UNITS), FreezeConfig(policy=name, rate=0.75))
    # Layers 2 and 5 move most; block 1 (4, 5, 6) more than block 0 in the mean.
    moves = [0.1, 0.1, 0.9, 0.1, 0.5, 0.8, 0.5, 0.1]
    for _ in range(4 * PRIMING):
        schedule.advance({layer: moves[layer] for layer in schedule.active})
    for _ in range(5):
        assert schedule.active == expected
        # Later statistics change nothing.
        schedule.advance(dict.fromkeys(schedule.active, 1e-9))
