from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.front import FRONTS, by_statistics, depths, front_of
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.trainable.units import ParameterRoles, Unit

NAMES = (
    "words.weight",
    "blocks.0.up.weight",
    "blocks.0.up.bias",
    "blocks.1.up.weight",
    "blocks.1.up.bias",
    "blocks.2.up.weight",
    "blocks.3.up.weight",
    "norm.bias",
    "head.weight",
)


def roles() -> ParameterRoles:
    units = tuple(Unit(name, "linear", 10) for name in NAMES if name.endswith("weight"))
    return ParameterRoles(units, tuple(n for n in NAMES if n.endswith("bias")), order=NAMES)


def schedule(**values) -> FreezeSchedule:
    return FreezeSchedule(roles(), FreezeConfig(policy="none", **values))


def test_depths():
    assert list(depths(NAMES).values()) == [0, 0, 0, 1, 1, 2, 3, 4, 4]


moved = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=2, max_size=12)


@pytest.mark.parametrize("rule", FRONTS)
@given(moved=moved)
def test_shares_grow_with_depth_and_the_first_step_goes_down_the_whole_way(rule, moved):
    shares = FRONTS[rule](moved)
    assert len(shares) == len(moved)
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] <= 1
    assert front_of(rule, moved, 0) == next((i for i, s in enumerate(shares) if s > 0), None)


@given(moved=st.lists(st.floats(0.01, 1), min_size=2, max_size=12))
def test_blocks_train_as_often_as_they_learn(moved):
    """Counted over steps: in proportion to the largest statistic so far, cut off at 1, three quarters in the mean."""
    steps = 400
    counts = [0] * len(moved)
    for choice in range(steps):
        for block in range(front_of("statistics", moved, choice), len(moved)):
            counts[block] += 1
    shares = [count / steps for count in counts]
    assert sum(shares) / len(shares) == pytest.approx(0.75, abs=0.02)
    highest = [max(moved[: i + 1]) for i in range(len(moved))]
    free = [(share, value) for share, value in zip(shares, highest, strict=True) if share < 0.99]
    for share, value in free:
        assert share / free[0][0] == pytest.approx(value / free[0][1], abs=0.05 / free[0][0])


def test_half_trains_the_lower_half_every_other_step():
    fronts = [front_of("half", [None] * 5, choice) for choice in range(200)]
    assert set(fronts) == {0, 2}
    assert fronts.count(0) == pytest.approx(100, abs=1)
    # Never three of a kind in a row.
    assert all(len(set(fronts[i : i + 3])) == 2 for i in range(198))


def test_statistics_that_nobody_has_measured_yet():
    assert by_statistics([0.1, None, 0.3]) == [1.0] * 3
    assert by_statistics([0.0, 0.0]) == [1.0] * 2


def test_units_and_small_parameters_rest_below_the_front():
    one = schedule(front="half")
    assert not one.is_static
    assert not one.measures
    assert one.front == 0
    assert one.active_names == {n for n in NAMES if n.endswith("weight")}
    before = one.fingerprint()
    one.advance({})
    assert one.front == 2
    assert one.active_names == {"blocks.2.up.weight", "blocks.3.up.weight", "head.weight"}
    assert [name for name in NAMES if name.endswith("bias") and one.trains(name)] == ["norm.bias"]
    assert one.missed_small("blocks.0.up.bias") == 0
    one.advance({})
    assert one.fingerprint() != before
    assert (one.front, one.missed(0), one.missed_small("blocks.0.up.bias"), one.missed(5)) == (0, 1, 1, 0)
    # Over the run everything trains.
    assert one.trained_names == {n for n in NAMES if n.endswith("weight")}


def test_always_active_layers_train_below_the_front_too():
    one = schedule(front="half", always_active=("blocks.0.*",))
    one.advance({})
    assert one.front == 2
    assert "blocks.0.up.weight" in one.active_names
    assert "blocks.1.up.weight" not in one.active_names


@pytest.mark.parametrize("never", ["blocks.0.*", "blocks.3.*"])
def test_small_parameters_miss_what_the_front_says_not_what_layers_beside_them_do(never):
    one = schedule(front="half", never_active=(never,))
    missed = []
    for _ in range(4):
        missed.append((one.front, one.missed_small("blocks.0.up.bias"), one.missed_small("norm.bias")))
        one.advance({})
    # The front goes 0, 2, 0, 2: block 0 misses a step before it trains again, the norm at the end none.
    assert missed == [(0, 0, 0), (2, 0, 0), (0, 1, 0), (2, 0, 0)]


def test_fronts_change_with_the_interval():
    one = schedule(front="half", interval=3)
    fronts = []
    for _ in range(9):
        fronts.append(one.front)
        one.advance({})
    assert fronts == [0, 0, 0, 2, 2, 2, 0, 0, 0]


@pytest.mark.parametrize("rule", FRONTS)
@pytest.mark.parametrize("interval", [1, 4])
def test_a_resumed_schedule_takes_the_fronts_up(rule, interval):
    def play(one: FreezeSchedule, steps: int) -> list:
        seen = []
        for _ in range(steps):
            seen.append((one.front, one.active, one.fingerprint()))
            one.advance({unit: (1 + unit % 3) / (1 + one.step) for unit in one.active})
        return seen

    whole = play(schedule(front=rule, interval=interval), 30)
    assert len({front for front, *_ in whole}) > 1
    first = schedule(front=rule, interval=interval)
    play(first, 13)
    second = schedule(front=rule, interval=interval)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert play(second, 17) == whole[13:]


def test_what_has_no_front_is_refused():
    with pytest.raises(ValueError, match="front half needs a policy under which everything above it trains"):
        FreezeConfig(policy="ils", front="half")
    with pytest.raises(ValueError, match="must be one of none, half, statistics, got 'third'"):
        FreezeConfig(front="third")
    alone = ParameterRoles((Unit("blocks.0.weight", "linear", 1),))
    with pytest.raises(ConfigError, match="the model has no list of blocks"):
        FreezeSchedule(alone, FreezeConfig(policy="none", front="half"))
