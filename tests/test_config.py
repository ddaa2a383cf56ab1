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
        "slimfit.extra is not a known key; known keys: freeze, activations, optimizer_states, memory_budget",
    ]


def test_preset_may_be_a_plain_name():
    assert SlimFitConfig.parse({"activations": "minimal"}).activations.preset == "minimal"


def test_a_parsed_block_survives_json():
    config = SlimFitConfig.parse({"freeze": {"rate": {"start": 0.5, "end": 0.9, "steps": 10}}})
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
        _KEY, _VALUE | st.dictionaries(st.sampled_from(["rate", "policy", "y"]), _VALUE), max_size=4
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


def test_auto_fills_in_what_the_block_does_not_say():
    freeze = SlimFitConfig.parse({"freeze": {"policy": "auto", "rate": 0.95}}).freeze
    assert (freeze.policy, freeze.rate, freeze.always_lr_scale) == ("columns", 0.95, 1.0)
    freeze = SlimFitConfig.parse({"freeze": {"policy": "auto", "always_lr_scale": 3.0}}).freeze
    assert (freeze.policy, freeze.always_lr_scale) == ("columns", 3.0)
    # Without it nothing changes: the paper's schedule.
    freeze = SlimFitConfig.parse({}).freeze
    assert (freeze.policy, freeze.head, freeze.lr_scale, freeze.refresh) == ("ils", "scheduled", 1.0, None)
