"""Recipes: reading, overriding, and finding all mistakes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.training.deepspeed_config import load_base, slimfit_block
from slimfit_ds.training.recipe import read_recipe

ROOT = Path(__file__).parents[2]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_short_forms_and_numbers_in_scientific_notation(tmp_path):
    draft = read_recipe(write(tmp_path / "r.yaml", "task: causal_lm\nmodel: gpt2\nlr: 8e-5\nmax_steps: 3\n"))
    assert draft.problems == ()
    assert draft.recipe.task == {"name": "causal_lm"}
    assert draft.recipe.lr == pytest.approx(0.00008)
    assert draft.name == "r"


def test_overrides_descend_and_are_read_as_yaml(tmp_path):
    path = write(
        tmp_path / "r.yaml", "task: causal_lm\nmodel: gpt2\nslimfit: {freeze: {policy: ils, rate: 0.5}}\n"
    )
    recipe = read_recipe(
        path, ["slimfit.freeze.rate=0.95", "task.max_length=64", "lr=1e-3", "eval_steps=null", "data=a=b"]
    ).recipe
    assert recipe.slimfit == {"freeze": {"policy": "ils", "rate": 0.95}}
    assert recipe.task == {"name": "causal_lm", "max_length": 64}
    assert recipe.lr == pytest.approx(1e-3)
    assert recipe.eval_steps is None
    assert recipe.data == "a=b"


def test_override_opens_a_null_block(tmp_path):
    path = write(tmp_path / "r.yaml", "task: causal_lm\nmodel: gpt2\nslimfit: null\n")
    assert read_recipe(path, ["slimfit.freeze.rate=0.5"]).recipe.slimfit == {"freeze": {"rate": 0.5}}


def test_all_mistakes_at_once_each_with_key_and_value(tmp_path):
    path = write(
        tmp_path / "r.yaml", "task: causal_lm\nmodel: {config: 3}\nlr: fast\nmax_step: 3\nseed: true\n"
    )
    draft = read_recipe(path, ["nonsense", "betas=[0.9]", "dtype=int8", "lr.x=1"])
    text = "\n".join(draft.problems)
    for part in (
        "'nonsense'",
        "model.config",
        "lr",
        "max_step",
        "'max_steps'",
        "seed",
        "True",
        "betas",
        "'int8'",
        "lr.x",
    ):
        assert part in text
    assert {"model", "lr", "seed", "betas", "dtype"} <= draft.broken
    assert len(draft.problems) == len(set(draft.problems)) == 8


@pytest.mark.parametrize(
    "text", ["", "- a\n- b\n", "a: [1\n", "a: b: c\n", "!!python/object:os.system {}\n", "\x00"]
)
def test_files_that_are_no_mapping(tmp_path, text):
    with pytest.raises(ConfigError, match="--config"):
        read_recipe(write(tmp_path / "r.yaml", text))


@pytest.mark.parametrize("name", ["missing.yaml", "a\0b", "."])
def test_files_that_cannot_be_read(name):
    with pytest.raises(ConfigError, match="cannot read"):
        read_recipe(name)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_sound(path):
    from slimfit_ds.schedule.policies import POLICIES
    from slimfit_ds.training.tasks import make_task

    draft = read_recipe(path)
    assert draft.problems == ()
    make_task(draft.recipe.task)
    block = slimfit_block(draft.recipe, load_base(draft.recipe, draft.folder))
    assert SlimFitConfig.parse(block).freeze.policy in POLICIES


def test_paper_settings_of_the_recipes():
    # The values of ALGORITHM.md, so that an edit of a recipe is a decision.
    cola = read_recipe(ROOT / "recipes/bert_cola.yaml").recipe
    assert (cola.lr, cola.train_batch_size, cola.task["max_length"], cola.epochs) == (8e-5, 32, 128, 3)
    assert (cola.scheduler, cola.weight_decay) == ("linear", 0.01)
    imagenet = read_recipe(ROOT / "recipes/vit_imagenet.yaml").recipe
    assert (imagenet.lr, imagenet.train_batch_size) == (5e-5, 128)
    squad = read_recipe(ROOT / "recipes/bert_squad2.yaml").recipe
    assert (squad.train_batch_size, squad.task["max_length"]) == (128, 384)


@pytest.mark.parametrize("key", ["str", "float", "function-x"])
def test_unknown_keys_that_read_like_types_are_named(tmp_path, key):
    path = write(tmp_path / "r.yaml", f"task: causal_lm\nmodel: gpt2\n{key}: 1\n")
    (line,) = read_recipe(path).problems
    assert line.startswith(f"{key} is not a known key")
