from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("512 mb", 512 * 10**6), ("1.5KiB", 1536), (4096, 4096)],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["24 XB", "", "GB", "-3GB", "0", True, "1e3GB"])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match=r"size|byte"):
        parse_bytes(text)


def test_all_errors_of_a_block_at_once():
    block = {
        "freeze": {"rate": 1.5, "polcy": "ils"},
        "optimizer_states": {"inactive": "disk"},
        "memory_budget": "lots",
        "extra": 1,
    }
    with pytest.raises(ConfigError) as caught:
        SlimFitConfig.parse(block)
    assert caught.value.problems == [
        "slimfit.freeze.rate must be in [0, 1), got 1.5",
        "slimfit.freeze.polcy is not a known key; did you mean 'policy'?",
        "slimfit.optimizer_states.inactive must be 'device' or 'host', got 'disk'",
        "slimfit.memory_budget must be a size such as 24GB or 24GiB, got 'lots'",
        "slimfit.extra is not a known key; known keys: freeze, activations, optimizer_states, frozen_weights, checkpoints, memory_budget",
    ]


def test_preset_may_be_a_plain_name():
    assert SlimFitConfig.parse({"activations": "minimal"}).activations.preset == "minimal"


def test_a_parsed_block_survives_json():
    config = SlimFitConfig.parse({"freeze": {"policy": "lisa", "rate": 0.95, "width": 0.25, "interval": 20}})
    assert SlimFitConfig.parse(config.model_dump(mode="json")) == config


_VALUE = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just([])
    | st.just({"a": 1})
)
_KEY = st.sampled_from(["freeze", "activations", "optimizer_states", "memory_budget", "x"])


@given(
    st.dictionaries(
        _KEY,
        _VALUE
        | st.dictionaries(st.sampled_from(["rate", "policy", "width", "budget", "lr_scale", "y"]), _VALUE),
        max_size=4,
    )
)
def test_any_block_is_parsed_or_refused_with_lines_that_name_the_key(block):
    problems = problems_of(block)
    assert all(problem.startswith("slimfit.") for problem in problems)


def problems_of(block) -> list[str]:
    try:
        SlimFitConfig.parse(block)
    except ConfigError as error:
        return error.problems or ["a ConfigError without a problem"]
    return []


def test_nothing_said_is_the_recommended_setting():
    for block in (
        {},
        {"freeze": {}},
        {"freeze": {"policy": "auto"}},
        {"freeze": {"policy": "static", "rate": 0.9}},
    ):
        freeze = SlimFitConfig.parse(block).freeze
        assert (freeze.policy, freeze.rate, freeze.width, freeze.splits) == ("static", 0.9, None, True)
        assert SlimFitConfig.parse(block) == SlimFitConfig()


def test_width_and_rate():
    def freeze(**values):
        return SlimFitConfig.parse({"freeze": values}).freeze

    # Of units that all train at every step the width says what is frozen.
    assert freeze(width=0.2).rate == pytest.approx(0.8)
    assert freeze(width=0.1, rate=0.9).splits
    assert not freeze(rate=0).splits
    assert not freeze(width=1.0).splits
    assert (freeze(policy="ils", rate=0.95).width, freeze(policy="ils").splits) == (None, False)
    assert freeze(policy="ils", rate=0.95, width=0.1).splits
    assert problems_of({"freeze": {"width": 0.2, "rate": 0.9}}) == [
        "slimfit.freeze: width 0.2 contradicts rate 0.9: with policy static every unit trains at every step, so leave "
        "one of them out, or let a policy such as ils choose among narrow units"
    ]
    assert "use static" in problems_of({"freeze": {"policy": "none", "width": 0.1}})[0]


def test_keys_and_values_that_are_gone_name_the_new_way():
    block = {
        "policy": "columns",
        "rate": {"start": 0.5, "end": 0.9, "steps": 10},
        "budget": ["layers", "parameters"],
        "refresh": 30,
        "head": "always",
        "statistic": "gradient_norm",
    }
    assert problems_of({"freeze": block}) == [
        "slimfit.freeze.policy: 'columns' is gone: use static",
        "slimfit.freeze.rate: a schedule of rates is gone: give one number in [0, 1)",
        "slimfit.freeze.budget: ['layers', 'parameters'] is gone: choose one of layers, parameters",
        "slimfit.freeze.refresh is gone: remove it, or choose policy static, under which every unit trains at every step",
        "slimfit.freeze.head is gone: name the head in always_active, such as [classifier]",
        "slimfit.freeze.statistic is gone: remove it: policies measure the relative update",
    ]
    for policy in ("progressive", "top_gradient", "ils_per_cost"):
        (problem,) = problems_of({"freeze": {"policy": policy}})
        assert problem.startswith(f"slimfit.freeze.policy: {policy!r} is gone: use ")
    assert problems_of({"freeze": {"budget": "flops"}}) == [
        "slimfit.freeze.budget: 'flops' is gone: choose one of layers, parameters"
    ]
    (problem,) = problems_of({"freeze": {"policy": "isl"}})
    assert "unknown 'isl'; did you mean 'ils'? known: auto, static, none, ils" in problem


def test_an_error_is_the_same_behind_a_process():
    import pickle

    from slimfit_ds.errors import ConfigError

    error = pickle.loads(pickle.dumps(ConfigError(["one", "two"])))
    assert (error.problems, str(error)) == (["one", "two"], "one\ntwo")


def test_settings_of_streaming_without_streaming_are_refused():
    for settings in ({"resident": 3}, {"buffers": 3}):
        with pytest.raises(ConfigError, match=r"slimfit\.frozen_weights.*set live to host"):
            SlimFitConfig.parse({"frozen_weights": settings})
    SlimFitConfig.parse({"frozen_weights": {"live": "device", "resident": 0}})
