from __future__ import annotations

import json
import math
import random

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.schedule.policies import POLICIES
from slimfit_ds.schedule.schedule import FreezeSchedule, freeze_problems, prepare_units, room_at
from slimfit_ds.trainable.units import ParameterRoles, Unit, discover


def of_sizes(sizes) -> ParameterRoles:
    return ParameterRoles(tuple(Unit(f"block.{i}.weight", "linear", size) for i, size in enumerate(sizes)))


def layers(count: int) -> ParameterRoles:
    return of_sizes([10] * count)


def ils(**values) -> FreezeConfig:
    return FreezeConfig(policy="ils", **values)


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
    schedule = FreezeSchedule(layers(count), ils(rate=percent / 100, seed=seed))
    statistics = [[generator.random() for _ in range(count)] for _ in range(12)]
    frozen = percent * count // 100
    for step, active in zip(
        statistics, paper_ils(schedule.state_dict()["state"]["distance"], frozen, statistics), strict=True
    ):
        assert schedule.active == active
        schedule.advance({layer: step[layer] for layer in schedule.active})


@given(count=st.integers(1, 60), tenths=st.integers(0, 9), seed=st.integers(0, 3))
def test_each_layer_trains_at_least_once(count, tenths, seed):
    schedule = FreezeSchedule(layers(count), ils(rate=tenths / 10, seed=seed))
    seen: set[int] = set()
    for _ in range(math.ceil(count / len(schedule.active))):
        seen |= schedule.active
        schedule.advance(dict.fromkeys(schedule.active, 0.5))
    assert seen == set(range(count))


def test_ties_go_to_the_first_layer():
    schedule = FreezeSchedule(layers(6), ils(rate=0.5))
    for _ in range(4):
        schedule.advance(dict.fromkeys(schedule.active, 0.25))
    assert schedule.active == {0, 1, 2}


def test_first_order_is_random_by_seed_only():
    first = [FreezeSchedule(layers(30), ils(seed=seed)).active for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize(("rate", "count"), [(0.9, 4), (0.95, 2), (0.29, 71), (0.999, 1), (0.0, 100)])
def test_how_many_layers_a_rate_leaves(rate, count):
    n_layers = 40 if rate in (0.9, 0.95) else 100
    assert len(FreezeSchedule(layers(n_layers), ils(rate=rate)).active) == count


def test_units_are_chosen_anew_after_every_interval():
    schedule = FreezeSchedule(layers(10), ils(rate=0.8, interval=3))
    sets = [schedule.active, *(schedule.advance(dict.fromkeys(schedule.active, 0.1)) for _ in range(8))]
    assert [len(set(sets[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
    assert len(set(sets)) == 3


def test_always_and_never():
    config = ils(rate=0.7, always_active=("block.9*",), never_active=("block.0*", "block.1.weight"))
    schedule = FreezeSchedule(layers(10), config)
    for _ in range(20):
        assert 9 in schedule.active
        assert len(schedule.active) == 3
        assert not schedule.active & {0, 1}
        schedule.advance({layer: 1 / (layer + 1) for layer in schedule.active})


@given(
    sizes=st.lists(st.integers(1, 500), min_size=3, max_size=30),
    rate=st.sampled_from([0.0, 0.5, 0.8]),
    policy=st.sampled_from(["ils", "random", "lisa", "badam", "far", "bsr"]),
)
def test_every_active_set_keeps_within_its_budget_and_every_layer_that_fits_trains(sizes, rate, policy):
    room = (1 - rate) * sum(sizes) + 1e-6
    try:
        schedule = FreezeSchedule(
            of_sizes(sizes), FreezeConfig(rate=rate, policy=policy, budget="parameters")
        )
    except ConfigError:
        assert min(sizes) > room
        return
    seen: set[int] = set()
    for _ in range(12 * len(sizes)):
        assert sum(sizes[i] for i in schedule.active) <= room
        seen |= schedule.active
        schedule.advance({layer: 1 / (2 + layer) for layer in schedule.active})
    oversized = {schedule.names.index(name) for name in schedule.oversized}
    assert oversized == {i for i, size in enumerate(sizes) if size > room}
    assert not seen & oversized
    if policy in ("ils", "badam", "far", "bsr"):
        assert seen | oversized == set(range(len(sizes)))


def test_a_layer_larger_than_the_budget_is_named():
    sizes = [900, 40, 30, 20, 10]
    schedule = FreezeSchedule(of_sizes(sizes), ils(rate=0.9, budget="parameters"))
    assert schedule.oversized == ("block.0.weight",)
    with pytest.warns(UserWarning, match=r"never trains block.0.weight, larger than"):
        schedule.warn_of_oversized()
    # 100 parameters fit: all but the first layer.
    assert schedule.active == {1, 2, 3, 4}


def test_a_budget_without_room_is_refused():
    ten = of_sizes([100] * 10)
    with pytest.raises(
        ConfigError, match=r"0\.95 leaves room for 50 parameters, less than the smallest layer"
    ):
        FreezeSchedule(ten, ils(rate=0.95, budget="parameters"))
    always = ("block.0", "block.1")
    with pytest.raises(
        ConfigError, match=r"rate 0\.9 leaves 100 parameters active, but always_active .* take 200"
    ):
        FreezeSchedule(ten, ils(rate=0.9, budget="parameters", always_active=always))


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
    config = FreezeConfig(policy=policy, rate=0.8)

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
    saved = FreezeSchedule(layers(4), ils()).state_dict()
    with pytest.raises(ConfigError) as caught:
        FreezeSchedule(layers(5), ils()).load_state_dict(saved)
    assert "only in the model: block.4.weight" in caught.value.problems


def test_all_problems_at_once():
    config = ils(
        rate=0.9,
        always_active=("block.*", "head"),
        never_active=("block.1.*",),
    )
    with pytest.raises(ConfigError) as caught:
        FreezeSchedule(layers(10), config)
    text = str(caught.value)
    assert "'head' matches no layer" in text
    assert "matched by always_active and by never_active" in text
    assert (
        "rate 0.9 leaves 1 layers active, but always_active and what else trains at every step take 10"
        in text
    )


def test_fingerprint_tells_sets_and_steps_apart():
    a, b = (FreezeSchedule(layers(20), ils(seed=seed)) for seed in (0, 1))
    assert a.fingerprint() != b.fingerprint()
    before = a.fingerprint()
    a.advance({})
    assert a.active == FreezeSchedule(layers(20), ils(seed=0)).active
    assert a.fingerprint() != before
    assert 0 <= a.fingerprint() < 2**63


def test_learning_rate_factors():
    config = ils(rate=0.8, lr_scale=4.0, always_lr_scale=0.5, always_active=("block.3*",))
    schedule = FreezeSchedule(layers(10), config)
    (chosen,) = schedule.active - {3}
    assert schedule.lr_factors() == {None: 0.5, 3: 0.5, chosen: 4.0}
    assert FreezeSchedule(layers(10), ils(rate=0.8)).lr_factors().keys() > {None}
    assert set(FreezeSchedule(layers(10), ils(rate=0.8)).lr_factors().values()) == {1.0}


class Net(nn.Module):
    """Embedding, `blocks` of a norm and two linear layers, a head; `[batch, tokens]` ids to `[batch, 2]`."""

    def __init__(self, blocks: int = 5, width: int = 40):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm": nn.LayerNorm(width), "up": nn.Linear(width, width), "down": nn.Linear(width, width)}
            )
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, 2)


def schedule_of(model: nn.Module, **values) -> FreezeSchedule:
    config = FreezeConfig(**values)
    assert freeze_problems(model, config) == []
    prepare_units(model, config)
    return FreezeSchedule(discover(model), config)


@pytest.mark.parametrize("policy", ["static", "ils"])
def test_the_rate_of_full_fine_tuning_is_multiplied_by_columns_over_trained_ones(policy):
    block = {"policy": policy, "rate": 0.8} | ({"width": 0.2} if policy == "ils" else {})
    model = Net()
    schedule = schedule_of(model, **block)
    count = model.blocks[0]["up"].split.count
    assert count < 20
    assert set(schedule.lr_factors().values()) == {1 / (count / 40)}
    # A number is taken as it stands, and then what trains whole has the optimizer's own rate.
    given = schedule_of(Net(), **block, lr_scale=3.0).lr_factors()
    whole = {i for i, unit in enumerate(schedule.units) if unit.width == 1} | {None}
    assert {given[i] for i in given.keys() - whole} == {3.0}
    assert {given[i] for i in given.keys() & whole} == {1.0}


def test_a_resumed_run_says_that_its_rates_are_multiplied_otherwise(recwarn):
    block = {"policy": "static", "rate": 0.8}
    saved = json.loads(json.dumps(schedule_of(Net(), **block).state_dict()))
    schedule_of(Net(), **block).load_state_dict(saved)
    older = {key: value for key, value in saved.items() if key != "lr_scales"}
    schedule_of(Net(), **block, lr_scale=3.0, always_lr_scale=1.0).load_state_dict(older)
    assert not recwarn.list
    factor = saved["lr_scales"]["lr_scale"]
    assert factor > 2
    with pytest.warns(UserWarning, match=rf"lr_scale was {factor:g} and is 3.*set lr_scale: {factor:g}"):
        schedule_of(Net(), **block, lr_scale=3.0).load_state_dict(saved)
    with pytest.warns(UserWarning, match="set lr_scale: 1, always_lr_scale: 1 to go on as before"):
        schedule_of(Net(), **block).load_state_dict(older)


def test_words_that_will_not_learn_are_named_whoever_splits_the_model():
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=300, hidden_size=40, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80
        )
    )
    model.resize_token_embeddings(302)
    with pytest.warns(UserWarning, match=r"2 added tokens will not learn \(ids 300, 301\)"):
        prepare_units(model, FreezeConfig(rate=0.9))


def test_layers_of_another_input_width_take_the_factor_of_the_others():
    model = Net()
    for block in model.blocks:
        block["down"] = nn.Linear(160, 40)
    schedule = schedule_of(model, policy="static", rate=0.8)
    up, down = (model.blocks[0][name].split.count for name in ("up", "down"))
    assert up == down
    assert set(schedule.lr_factors().values()) == {1 / (up / 40)}


@pytest.mark.parametrize("budget", ["layers", "parameters"])
@pytest.mark.parametrize("policy", ["ils", "random", "lisa", "badam", "far", "bsr"])
def test_policies_choose_among_narrow_units(policy, budget):
    schedule = schedule_of(Net(10), policy=policy, rate=0.95, width=0.1, budget=budget)
    narrow = [i for i, name in enumerate(schedule.names) if name.endswith("columns")]
    assert len(narrow) == 20
    # Norms and the head train at every step; in `layers` they are no choice and do not count.
    whole = set(range(len(schedule.units))) - set(narrow)
    seen = set()
    for _ in range(30):
        assert whole < schedule.active
        chosen = schedule.active - whole
        # A tenth of each of 20 layers, and a twentieth of all is active: half of the units.
        half = 10 if budget == "layers" else (0.05 * (20 * 1600 + 10 * 40 + 80) - 480) // 160
        # The last group of a cycle of badam is what is left.
        assert len(chosen) == half or (policy == "badam" and len(chosen) == 20 % half)
        seen |= chosen
        schedule.advance({unit: 1 / (2 + unit) for unit in schedule.active})
    assert seen == set(narrow)


def test_frozen_layers_count_into_the_rate_of_narrow_units():
    schedule = schedule_of(
        Net(10), policy="ils", rate=0.9, width=0.1, never_active=("blocks.0.*", "blocks.1.*")
    )
    # 20 layers, of which a tenth may train; 16 of them are units, each a tenth: all fit.
    assert sum(
        schedule.units[i].width for i in schedule.active if schedule.units[i].width < 1
    ) == pytest.approx(1.6)
    assert schedule.is_static
    plain = schedule_of(Net(10), policy="ils", rate=0.95, width=0.1, always_active=("blocks.0.up",))
    # A whole layer has the place of ten units.
    assert len([u for u in plain.active if plain.units[u].width < 1]) == 0


def test_narrow_units_beside_what_trains_whole_may_be_too_much():
    config = FreezeConfig(policy="ils", rate=0.99, width=0.1, always_active=("blocks.0.up",))
    (problem,) = freeze_problems(Net(), config)
    assert (
        "rate 0.99 leaves 0.1 layers active, but always_active and what else trains at every step take 1"
        in problem
    )


@pytest.mark.parametrize(
    ("values", "static"),
    [
        ({}, True),
        ({"rate": 0.0}, True),
        ({"width": 0.25}, True),
        ({"policy": "none"}, True),
        ({"policy": "ils"}, False),
        ({"policy": "ils", "rate": 0.0}, True),
        ({"policy": "random", "width": 0.1, "rate": 0.9}, True),
        ({"policy": "random", "width": 0.1, "rate": 0.95}, False),
        ({"policy": "far", "rate": 0.5}, False),
    ],
)
def test_a_schedule_knows_whether_it_ever_changes(values, static):
    schedule = schedule_of(Net(), **values)
    assert schedule.is_static == static
    first = schedule.active
    changed = [
        schedule.advance({unit: 1 / (1 + unit) for unit in schedule.active}) != first for _ in range(20)
    ]
    assert any(changed) == (not static)


def test_static_at_rate_zero_trains_everything_whole():
    model = Net()
    schedule = schedule_of(model, rate=0.0, never_active=("blocks.0.up",))
    assert not any(name.endswith("columns") for name in schedule.names)
    assert schedule.active_names == set(schedule.names) - {"blocks.0.up.weight"}


def test_a_schedule_of_before_the_units_is_understood():
    """Keys as written at c71cc45."""
    names = list(layers(3).names)
    saved = {
        "layers": names,
        "policy": "ils",
        "state": {"distance": [0.5, 2e10, 0.25]},
        "step": 4,
        "active": [1],
        "visits": [2, 0, 2],
        "last": [3, -1, 2],
        "statistics": {names[0]: 0.5, names[2]: 0.25},
    }
    schedule = FreezeSchedule(layers(3), ils(rate=0.7))
    schedule.load_state_dict(saved)
    assert (schedule.step, schedule.active, schedule.missed(2)) == (4, {1}, 1)
    assert schedule.advance({1: 0.1}) == {0}
    # `columns` trained what `static` trains: everything there is.
    fixed = FreezeSchedule(layers(3), FreezeConfig(rate=0.0))
    fixed.load_state_dict({**saved, "policy": "columns", "state": {}, "active": [0, 1, 2]})
    assert (fixed.step, fixed.active) == (4, {0, 1, 2})


def test_room_at_counts_elements_before_the_split():
    model = Net()
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1) + 5 * 40
    prepare_units(model, FreezeConfig(policy="ils", width=0.1))
    assert room_at(discover(model), "parameters", 0.9).room == pytest.approx(0.1 * total)


@pytest.mark.parametrize("values", [{}, {"policy": "ils"}, {"policy": "ils", "width": 0.25}])
def test_globs_for_the_head_of_a_model_that_ties_it(values):
    """As in recipes/llama_instruct.yaml."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        tie_word_embeddings=True,
    )
    schedule = schedule_of(LlamaForCausalLM(shape), never_active=("*embed_tokens*", "lm_head*"), **values)
    for _ in range(30):
        assert "model.embed_tokens.weight" not in schedule.active_names
        schedule.advance({unit: 1 / (1 + unit) for unit in schedule.active})
