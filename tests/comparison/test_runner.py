"""A strategy of the catalogue is a sound recipe, and what a failed run says of itself is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from slimfit_ds.comparison.runner import _failed, overrides_of
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.planner.strategies import STRATEGIES, TUNED_BUCKET
from slimfit_ds.tasks.recipe import read_recipe
from slimfit_ds.tasks.setup import deepspeed_config

RECIPE = str(Path(__file__).parents[2] / "recipes" / "digits_vit.yaml")
OWN = SlimFitConfig.parse(yaml.safe_load(Path(RECIPE).read_text())["slimfit"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_is_what_it_says(name):
    strategy = STRATEGIES[name]
    words, stage = overrides_of(strategy, RECIPE, ["max_steps=7"])
    recipe, _ = read_recipe(["--config", RECIPE, *words])
    config = deepspeed_config(recipe)
    assert (recipe.arguments["max_steps"], recipe.arguments["save_strategy"]) == (7, "no")
    zero = config["zero_optimization"]
    assert zero["stage"] == stage == (strategy.stage if strategy.own_zero else 1)
    assert zero.get("reduce_bucket_size") == strategy.bucket
    assert bool(zero.get("offload_optimizer")) == strategy.offload
    assert (None if recipe.lora is None else recipe.lora.r) == strategy.lora
    own = yaml.safe_load(Path(RECIPE).read_text())["learning_rate"]
    assert recipe.arguments["learning_rate"] == pytest.approx(own * (10 if name == "lora" else 1))
    assert bool(recipe.arguments.get("gradient_checkpointing")) == strategy.gradient_checkpointing
    assert ("slimfit" in config) == (strategy.slimfit is not None)
    if strategy.slimfit is None:
        return
    block, stated = SlimFitConfig.parse(config["slimfit"]), SlimFitConfig.parse(strategy.slimfit)
    # The recipe's freezing unless the strategy says something about it, and its rate in any case.
    assert block.freeze.rate == OWN.freeze.rate
    policy = stated.freeze.policy if "freeze" in strategy.slimfit else OWN.freeze.policy
    assert block.freeze.policy == policy
    assert block.activations == stated.activations
    assert block.optimizer_states == stated.optimizer_states


def test_without_a_block_slimfit_is_the_recommended_setting(tmp_path):
    values = {**yaml.safe_load(Path(RECIPE).read_text()), "slimfit": None, "deepspeed": None}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    words, stage = overrides_of(STRATEGIES["slimfit"], str(path))
    config = deepspeed_config(read_recipe(["--config", str(path), *words])[0])
    assert SlimFitConfig.parse(config["slimfit"]) == SlimFitConfig()
    assert config["zero_optimization"]["reduce_bucket_size"] == TUNED_BUCKET
    assert stage == 1


def test_a_recipe_that_wants_its_best_model_keeps_its_checkpoints():
    recipe = str(Path(RECIPE).with_name("minilm_cola.yaml"))
    words, _ = overrides_of(STRATEGIES["full"], recipe)
    assert not any(word.startswith("save_strategy") for word in words)


def test_a_json_that_cannot_be_read(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*broken\.json"):
        overrides_of(STRATEGIES["full"], RECIPE, [f"deepspeed={json.dumps(str(path))}"])


@pytest.mark.parametrize(
    ("log", "status", "words"),
    [
        ("1 problem in the recipe:\n  - learning_rate must be positive\n", "failed", "learning_rate must be"),
        (
            "Traceback:\n  x\n[rank1]: torch.OutOfMemoryError: CUDA\n",
            "out of memory",
            "torch.OutOfMemoryError: CUDA",
        ),
        ("Traceback:\n  x\nValueError: no\nsigkill_handler\n", "failed", "ValueError: no"),
        ("Process 7 exits with return code = -9\n", "out of memory", "exit code 1"),
    ],
)
def test_the_reason_of_a_failure(tmp_path, log, status, words):
    (tmp_path / "log.txt").write_text(log)
    outcome = _failed(STRATEGIES["full"], 1, tmp_path / "log.txt")
    assert outcome.status == status
    assert outcome.error.startswith(words)
    assert "log.txt" in outcome.error
