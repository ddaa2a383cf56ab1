"""Every method is a recipe without mistakes."""

from pathlib import Path

import pytest

from slimfit_ds.comparison.methods import DEFAULT_METHODS, METHODS, get_method
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.training.deepspeed_config import deepspeed_config, load_base, slimfit_block
from slimfit_ds.training.recipe import read_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "digits_vit.yaml"


@pytest.mark.parametrize("name", METHODS)
def test_overrides_are_valid(name):
    method = METHODS[name]
    draft = read_recipe(RECIPE, method.overrides)
    assert draft.problems == ()
    base = load_base(draft.recipe, draft.folder)
    config = deepspeed_config(draft.recipe, base, 2)
    block = slimfit_block(draft.recipe, base)
    if "slimfit=null" in method.overrides:
        assert "slimfit" not in config
    else:
        own = read_recipe(RECIPE).recipe.slimfit
        assert SlimFitConfig.parse(block).freeze == SlimFitConfig.parse(own).freeze
    if method.stage is not None:
        assert config["zero_optimization"]["stage"] == method.stage


def test_issue_s_list_is_the_default():
    assert set(DEFAULT_METHODS) == {
        *("zero0", "zero1", "zero2", "zero3", "gradient_checkpointing", "lora", "balanced", "lean", "minimal")
    }


def test_unknown_method():
    with pytest.raises(ValueError, match="did you mean 'minimal'"):
        get_method("minimall")
