from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.budget import active_count
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.policies import POLICIES
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.trainable.layers import Layer


def layers(count: int) -> list[Layer]:
    return [Layer(f"block.{i}.weight", "linear", 10) for i in range(count)]


def paper_ils(distance: list[float], n_frozen: int, statistics: list[list[float]]) -> list[set[int]]:
    """The method as the paper words it, in the simplest form: which layers train at each step."""
    distance, history = list(distance), []
    for step_statistics in statistics:
        order = sorted(range(len(distance)), key=lambda layer: distance[layer])
        frozen = set(order[:n_frozen])
        active = set(range(len(distance))) - frozen
        history.append(active)
        for layer in active:
            distance[layer] = step_statistics[layer]
    return history


@given(count=st.integers(2, 40), percent=st.integers(0, 99), seed=st.integers(0, 999))
def test_ils_chooses_what_the_paper_chooses(count, percent, seed):
    generator = random.Random(seed)
    schedule = FreezeSchedule(layers(count), FreezeConfig(rate=percent / 100, seed=seed))
    statistics = [[generator.random() for _ in range(count)] for _ in range(12)]
    frozen = percent * count // 100
    for step, active in zip(
        statistics, paper_ils(schedule.state_dict()["state"]["distance"], frozen, statistics), strict=True
    ):
        assert schedule.active == active
        schedule.advance({layer: step[layer] for layer in schedule.active})


@given(count=st.integers(1, 60), tenths=st.integers(0, 9), seed=st.integers(0, 3))
def test_each_layer_trains_at_least_once(count, tenths, seed):
    schedule = FreezeSchedule(layers(count), FreezeConfig(rate=tenths / 10, seed=seed))
    seen: set[int] = set()
    for _ in range(math.ceil(count / len(schedule.active))):
        seen |= schedule.active
        schedule.advance(dict.fromkeys(schedule.active, 0.5))
    assert seen == set(range(count))


def test_ties_go_to_the_first_layer():
    schedule = FreezeSchedule(layers(6), FreezeConfig(rate=0.5))
    for _ in range(4):
        schedule.advance(dict.fromkeys(schedule.active, 0.25))
    assert schedule.active == {0, 1, 2}


def test_first_order_is_random_by_seed_only():
    first = [FreezeSchedule(layers(30), FreezeConfig(seed=seed)).active for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize(("rate", "count"), [(0.9, 4), (0.95, 2), (0.29, 71), (0.999, 1), (0.0, 100)])
def test_active_count(rate, count):
    n_layers = 40 if rate in (0.9, 0.95) else 100
    assert active_count(n_layers, rate) == count


def test_rate_schedule_and_interval():
    rate = {"start": 0.0, "end": 0.9, "steps": 4}
    schedule = FreezeSchedule(layers(10), FreezeConfig(rate=rate, interval=2))
    sizes = []
    for _ in range(8):
        sizes.append(len(schedule.active))
        schedule.advance(dict.fromkeys(schedule.active, 0.1))
    # Chosen at steps 0, 2, 4, 6, at rates 0, 0.45, 0.9, 0.9.
    assert sizes == [10, 10, 6, 6, 1, 1, 1, 1]


def test_cosine_rate_moves_slowly_at_both_ends():
    config = FreezeConfig(rate={"start": 0.2, "end": 0.8, "steps": 10, "shape": "cosine"})
    assert config.rate_at(0) == pytest.approx(0.2)
    assert config.rate_at(5) == pytest.approx(0.5)
    assert config.rate_at(1) - 0.2 < 0.06 * 0.6
    assert config.rate_at(99) == pytest.approx(0.8)


def test_always_and_never():
    config = FreezeConfig(rate=0.7, always_active=("block.9*",), never_active=("block.0*", "block.1.weight"))
    schedule = FreezeSchedule(layers(10), config)
    for _ in range(20):
        assert 9 in schedule.active
        assert len(schedule.active) == 3
        assert not schedule.active & {0, 1}
        schedule.advance({layer: 1 / (layer + 1) for layer in schedule.active})


def mixed_layers(seed: int, count: int) -> list[Layer]:
    generator = random.Random(seed)
    return [
        Layer(f"block.{i}.weight", "linear", generator.randint(1, 500), generator.choice([0, 8, 32]))
        for i in range(count)
    ]


def products(layer: Layer) -> int:
    """Multiply-adds of a weight gradient per position."""
    return layer.numel if layer.inputs > 0 else 0


@given(
    seed=st.integers(0, 50),
    count=st.integers(3, 30),
    rate=st.sampled_from([0.0, 0.5, 0.8]),
    policy=st.sampled_from(["ils", "random"]),
    budget=st.sampled_from(["parameters", "activations", "flops", ("parameters", "activations", "layers")]),
)
def test_every_active_set_keeps_within_its_budget_and_every_layer_that_fits_trains(
    seed, count, rate, policy, budget
):
    all_layers = mixed_layers(seed, count)
    config = FreezeConfig(rate=rate, policy=policy, budget=budget, seed=seed)
    try:
        schedule = FreezeSchedule(all_layers, config)
    except ConfigError:
        # No layer fits alone: each exceeds a currency (one layer of the count always fits).
        for layer in all_layers:
            shares = {
                "parameters": (layer.numel, sum(other.numel for other in all_layers)),
                "activations": (layer.inputs, sum(other.inputs for other in all_layers)),
                "flops": (products(layer), sum(map(products, all_layers))),
            }
            assert any(
                cost > (1 - rate) * total + 1e-6
                for cost, total in map(shares.get, {*config.budget} & {*shares})
            )
        return
    seen: set[int] = set()
    for _ in range(12 * count):
        active = [all_layers[i] for i in schedule.active]
        if "parameters" in config.budget:
            total = sum(layer.numel for layer in all_layers)
            assert sum(layer.numel for layer in active) <= (1 - rate) * total + 1e-6
        if "activations" in config.budget:
            total = sum(layer.inputs for layer in all_layers)
            assert sum(layer.inputs for layer in active) <= (1 - rate) * total + 1e-6
        if "flops" in config.budget:
            assert sum(map(products, active)) <= (1 - rate) * sum(map(products, all_layers)) + 1e-6
        seen |= schedule.active
        schedule.advance({layer: 1 / (2 + layer) for layer in schedule.active})
    assert {schedule.names[i] for i in range(count) if i not in seen} >= set(schedule.oversized)
    if policy == "ils":
        assert {schedule.names[i] for i in range(count) if i not in seen} == set(schedule.oversized)


def test_a_layer_larger_than_the_budget_is_named():
    sizes = [900, 40, 30, 20, 10]
    schedule = FreezeSchedule(
        [Layer(f"l{i}", "linear", n) for i, n in enumerate(sizes)],
        FreezeConfig(rate=0.9, budget="parameters"),
    )
    assert schedule.oversized == ("l0",)
    with pytest.warns(UserWarning, match=r"never trains l0, larger than"):
        schedule.warn_of_oversized()
    # 100 parameters fit: all but the first layer.
    assert schedule.active == {1, 2, 3, 4}


def test_a_budget_without_room_is_refused():
    with pytest.raises(
        ConfigError, match=r"0\.95 leaves room for 50 parameters, less than the smallest layer"
    ):
        FreezeSchedule(
            [Layer(f"l{i}", "linear", 100) for i in range(10)], FreezeConfig(rate=0.95, budget="parameters")
        )
    with pytest.raises(ConfigError, match=r"always_active matches 200 parameters, but rate 0\.9 leaves 100"):
        FreezeSchedule(
            [Layer(f"l{i}", "linear", 100) for i in range(10)],
            FreezeConfig(rate=0.9, budget="parameters", always_active=("l0", "l1")),
        )


def test_none_trains_all_but_never():
    schedule = FreezeSchedule(layers(5), FreezeConfig(policy="none", never_active=("block.2*",)))
    assert schedule.active == {0, 1, 3, 4}


def test_random_differs_from_step_to_step_and_repeats_by_seed():
    def draws(seed: int) -> list[frozenset[int]]:
        schedule = FreezeSchedule(layers(40), FreezeConfig(policy="random", seed=seed))
        return [schedule.advance({}) for _ in range(50)]

    assert draws(3) == draws(3) != draws(4)
    assert all(len(active) == 4 for active in draws(3))
    assert len(set().union(*draws(3))) == 40


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_resumed_schedule_goes_on_as_if_never_stopped(policy):
    config = FreezeConfig(policy=policy, rate=0.8, refresh=9, lr_scale="auto")

    def play(schedule: FreezeSchedule, steps: int) -> list:
        chosen = []
        for _ in range(steps):
            chosen.append((schedule.active, schedule.lr_factors()))
            schedule.advance({layer: math.sin(schedule.step * 7 + layer) ** 2 for layer in schedule.active})
        return chosen

    whole = play(FreezeSchedule(layers(20), config), 30)
    first = FreezeSchedule(layers(20), config)
    play(first, 13)
    saved = json.loads(json.dumps(first.state_dict()))
    second = FreezeSchedule(layers(20), config)
    second.load_state_dict(saved)
    assert play(second, 17) == whole[13:]


def test_a_state_of_other_layers_is_refused_with_the_difference():
    saved = FreezeSchedule(layers(4), FreezeConfig()).state_dict()
    with pytest.raises(ConfigError) as caught:
        FreezeSchedule(layers(5), FreezeConfig()).load_state_dict(saved)
    assert "only in the model: block.4.weight" in caught.value.problems


def test_all_problems_at_once():
    config = FreezeConfig(
        policy="isl",
        statistic="size",
        rate=0.9,
        always_active=("block.*", "head"),
        never_active=("block.1.*",),
    )
    with pytest.raises(ConfigError) as caught:
        FreezeSchedule(layers(10), config)
    text = str(caught.value)
    assert "unknown 'isl'; did you mean 'ils'?" in text
    assert "slimfit.freeze.statistic: unknown 'size'" in text
    assert "'head' matches no layer" in text
    assert "matched by always_active and by never_active" in text
    assert "always_active matches 10 layers, but rate 0.9 leaves 1" in text


def test_fingerprint_tells_sets_and_steps_apart():
    a, b = (FreezeSchedule(layers(20), FreezeConfig(seed=seed)) for seed in (0, 1))
    assert a.fingerprint() != b.fingerprint()
    before = a.fingerprint()
    a.advance({})
    assert a.active == FreezeSchedule(layers(20), FreezeConfig(seed=0)).active
    assert a.fingerprint() != before
    assert 0 <= a.fingerprint() < 2**63


def test_a_layer_that_waited_too_long_goes_before_all_others():
    # Layers 0 and 1 always look best; without refresh nobody else trains after the first cycle.
    schedule = FreezeSchedule(layers(10), FreezeConfig(rate=0.8, refresh=8))
    waited = dict.fromkeys(range(10), 0)
    longest = 0
    for _ in range(60):
        for layer in range(10):
            waited[layer] = 0 if layer in schedule.active else waited[layer] + 1
            longest = max(longest, waited[layer])
        schedule.advance({layer: 1.0 if layer < 2 else 0.1 for layer in schedule.active})
    # Overdue after 8 steps; at worst the other seven of the eight are overdue too, two of them train in a step.
    assert 8 <= longest <= 8 + 3
    assert {0, 1} <= set().union(*(schedule.advance({0: 1.0, 1: 1.0}) for _ in range(3)))


def test_refresh_leaves_always_active_layers_their_room():
    schedule = FreezeSchedule(layers(10), FreezeConfig(rate=0.8, refresh=2, always_active=("block.9*",)))
    for _ in range(30):
        assert 9 in schedule.active
        assert len(schedule.active) == 2
        schedule.advance(dict.fromkeys(schedule.active, 0.5))


def test_learning_rate_factors():
    config = FreezeConfig(rate=0.8, lr_scale=4.0, always_lr_scale=0.5, always_active=("block.3*",))
    schedule = FreezeSchedule(layers(10), config)
    (chosen,) = schedule.active - {3}
    assert schedule.lr_factors() == {None: 0.5, 3: 0.5, chosen: 4.0}
    assert FreezeSchedule(layers(10), FreezeConfig(rate=0.8)).lr_factors().keys() > {None}
    assert set(FreezeSchedule(layers(10), FreezeConfig(rate=0.8)).lr_factors().values()) == {1.0}


def test_automatic_factor_is_the_root_of_how_rarely_a_layer_trained():
    schedule = FreezeSchedule(layers(10), FreezeConfig(rate=0.9, lr_scale="auto", seed=5))
    # Before anything is known: the rate's share, 1 / sqrt(0.1).
    assert schedule.lr_factors()[next(iter(schedule.active))] == pytest.approx(math.sqrt(10))
    visits = [0] * 10
    for step in range(40):
        (layer,) = schedule.active
        # By hand: a prior of 2 updates in 20 steps.
        assert schedule.lr_factors()[layer] == pytest.approx(math.sqrt((step + 20) / (visits[layer] + 2)))
        visits[layer] += 1
        schedule.advance({layer: 1.0 if layer == 4 else 0.1})
    assert visits[4] > 20


def with_head(size: int) -> list[Layer]:
    return [*layers(19), Layer("head.weight", "linear", size, 1)]


def test_the_head_always_trains_where_it_leaves_half_of_the_budget():
    for rate, expected in ((0.9, {19}), (0.95, set())):
        schedule = FreezeSchedule(with_head(5), FreezeConfig(rate=rate, head="always"))
        always = frozenset.intersection(
            schedule.active,
            *(schedule.advance({i: 0.0 if i == 19 else 1.0 for i in schedule.active}) for _ in range(40)),
        )
        assert always == expected
        assert 19 in schedule.lr_factors() or not expected


def test_a_head_that_never_trains_or_is_an_output_embedding():
    never = FreezeSchedule(with_head(5), FreezeConfig(rate=0.5, head="always", never_active=("head*",)))
    assert 19 not in never.active
    large = FreezeSchedule(with_head(11), FreezeConfig(rate=0.5, head="always", always_lr_scale=7.0))
    assert 7.0 not in {factor for layer, factor in large.lr_factors().items() if layer is not None}
