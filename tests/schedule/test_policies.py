"""Each policy against selections worked out by hand."""

from __future__ import annotations

import json

import pytest

from slimfit_ds.schedule.budget import Budget, room_at
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.policies import POLICIES, Selection
from slimfit_ds.schedule.policies.far import PRIMING
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.trainable.layers import Layer

# embedding; two blocks of three; head.
NAMES = ["embed", *(f"layers.{block}.{part}" for block in range(2) for part in "qvf"), "head"]
LAYERS = tuple(Layer(f"{name}.weight", "linear", 10 * (i + 1), i) for i, name in enumerate(NAMES))


def selection(active: int, step: int = 0, interval: int = 1, layers=LAYERS, **changes) -> Selection:
    """What the schedule would ask, with room for `active` layers."""
    values = {
        "layers": layers,
        "step": step,
        "choice": step // interval,
        "budget": Budget(tuple((1,) for _ in layers), (active,)),
        "candidates": tuple(range(len(layers))),
        "always": frozenset(),
        "seed": 0,
    }
    return Selection(**{**values, **changes})


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_state_survives_json_and_sets_keep_the_budget(name):
    policy = POLICIES[name]
    state = policy.init(len(LAYERS), 0)
    for step in range(40):
        asked = selection(3, step, always=frozenset({7}), candidates=(0, 1, 2, 3, 5, 6))
        chosen = policy.select(state, asked)
        assert 7 in chosen
        assert 4 not in chosen, "never active"
        assert not policy.keeps_budget or len(chosen) <= 3
        assert policy.select(json.loads(json.dumps(state)), asked) == chosen
        state = policy.observe(state, {layer: 1.0 / (1 + layer + step) for layer in chosen})


@pytest.mark.parametrize("name", ["ils", "ils_per_cost", "top_gradient", "badam", "far", "bsr"])
def test_each_layer_trains_in_the_first_cycle(name):
    schedule = FreezeSchedule(LAYERS, FreezeConfig(policy=name, rate=0.75))
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
    budget = Budget(((9,), (1,), (1,), (1,), (1,), (1,), (1,), (1,)), (4,))
    assert POLICIES["lisa"].select({}, selection(0, budget=budget)) in ({1, 2, 3, 7}, {4, 5, 6, 7})


def test_badam_cycles_through_neighbours():
    order = [POLICIES["badam"].select({}, selection(3, step)) for step in range(9)]
    groups = {frozenset({0, 1, 2}), frozenset({3, 4, 5}), frozenset({6, 7})}
    for cycle in (0, 3, 6):
        assert set(order[cycle : cycle + 3]) == groups
    assert len({tuple(order[cycle : cycle + 3]) for cycle in (0, 3, 6)}) > 1, "shuffled anew"


def test_badam_holds_a_group_for_an_interval():
    schedule = FreezeSchedule(LAYERS, FreezeConfig(policy="badam", rate=0.7, interval=4))
    sets = [schedule.active, *(schedule.advance({}) for _ in range(11))]
    assert [len(set(sets[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1]
    assert frozenset().union(*sets) == frozenset(range(8))


def test_badam_cuts_by_cost_and_leaves_out_what_never_fits():
    budget = Budget(((5,), (1,), (2,), (2,), (1,), (9,), (1,), (3,)), (4,))
    chosen = [POLICIES["badam"].select({}, selection(0, step, budget=budget)) for step in range(3)]
    # 0 (cost 5) and 5 (cost 9) never fit; 1+2 | 3+4+6 | 7.
    assert set(chosen) == {frozenset({1, 2}), frozenset({3, 4, 6}), frozenset({7})}


def test_progressive_trains_next_to_the_output():
    policy = POLICIES["progressive"]
    assert policy.select(policy.init(8, 0), selection(3)) == {5, 6, 7}


def test_progressive_moves_its_front_over_settled_layers():
    policy = POLICIES["progressive"]
    state = policy.init(4, 0)
    state = policy.observe(state, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0})
    assert state["front"] == 0, "one value is no change yet"
    # Changes 0.1, 0.2, 0.5, 0.9: the median is 0.35, so layers 0 and 1 have settled.
    state = policy.observe(state, {0: 1.1, 1: 0.8, 2: 1.5, 3: 0.1})
    assert state["front"] == 2
    four = LAYERS[:4]
    budget = Budget(((1,),) * 4, (4,))
    assert policy.select(state, selection(4, layers=four, budget=budget, candidates=(0, 1, 2, 3))) == {2, 3}
    # It never freezes the last layer, nor one that did not train.
    for value in (0.2, 0.2001, 0.20011):
        state = policy.observe(state, {3: value})
    assert state["front"] == 2


@pytest.mark.parametrize(("name", "expected"), [("far", {2, 5}), ("bsr", {4, 7})])
def test_choice_made_once_after_priming(name, expected):
    schedule = FreezeSchedule(LAYERS, FreezeConfig(policy=name, rate=0.75))
    # Layers 2 and 5 move most; block 1 (4, 5, 6) more than block 0 in the mean.
    moves = [0.1, 0.1, 0.9, 0.1, 0.5, 0.8, 0.5, 0.1]
    for _ in range(4 * PRIMING):
        schedule.advance({layer: moves[layer] for layer in schedule.active})
    for _ in range(5):
        assert schedule.active == expected
        # Later statistics change nothing.
        schedule.advance(dict.fromkeys(schedule.active, 1e-9))


def test_top_gradient_divides_by_the_visits():
    policy = POLICIES["top_gradient"]
    state = policy.init(3, 0)
    three = {"layers": LAYERS[:3], "candidates": (0, 1, 2), "budget": Budget(((1,),) * 3, (1,))}
    counts = [0, 0, 0]
    for _ in range(60):
        (layer,) = policy.select(state, selection(1, **three))
        counts[layer] += 1
        state = policy.observe(state, {layer: (3.0, 2.0, 1.0)[layer]})
    # Equal size / visits in the long run: visits in proportion 3 : 2 : 1.
    assert counts == pytest.approx([30, 20, 10], abs=1)


def test_update_per_cost():
    policy = POLICIES["ils_per_cost"]
    state = {"distance": [4.0, 3.0, 2.0, 1.0]}
    layers = tuple(Layer(f"l{i}", "linear", size, 1) for i, size in enumerate((80, 20, 10, 1)))
    both = {"layers": layers, "candidates": (0, 1, 2, 3)}
    # Per parameter: 4/80 < 3/20 < 2/10 < 1/1; room for 31 of 111.
    chosen = policy.select(state, selection(0, budget=room_at(layers, ["parameters"], 1 - 31 / 111), **both))
    assert chosen == {3, 2, 1}
    # Where every layer costs one it is ILS.
    assert policy.select(state, selection(2, budget=room_at(layers, ["layers"], 0.5), **both)) == {0, 1}
