"""The DeepSpeed configuration of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.training.deepspeed_config import (
    deepspeed_config,
    load_base,
    merge,
    replaced_values,
    slimfit_block,
)
from slimfit_ds.training.recipe import read_recipe

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


def recipe_of(*overrides):
    return read_recipe(None, ["task=causal_lm", "model=m", *overrides]).recipe


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_json_of_the_project_is_one_that_deepspeed_reads(path, one_rank):
    from deepspeed.runtime.config import DeepSpeedConfig

    from slimfit_ds.engine.compatibility import config_problems

    content = json.loads(path.read_text())
    parsed = DeepSpeedConfig(str(path))
    assert parsed.zero_optimization_stage == int(path.stem.removeprefix("slimfit_")[4])
    assert ("slimfit" in content) == path.stem.startswith("slimfit_")
    if "slimfit" in content:
        assert config_problems(content, SlimFitConfig.parse(content["slimfit"]), None) == []


def test_stages_and_offloading_are_all_there():
    names = {path.stem for path in FILES}
    plain = {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"}
    assert plain | {f"slimfit_{name}" for name in plain} <= names


def test_merge_goes_into_mappings_and_replaces_the_rest():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merge(base, {"a": {"c": [3]}, "d": {"e": 2}}) == {"a": {"b": 1, "c": [3]}, "d": {"e": 2}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], {"freeze": {"rate": 0.5, "policy": "ils"}}),
        (["slimfit=null"], None),
        (["slimfit.freeze.rate=0.9"], {"freeze": {"rate": 0.9, "policy": "ils"}}),
        (
            ["slimfit.activations=minimal"],
            {"freeze": {"rate": 0.5, "policy": "ils"}, "activations": "minimal"},
        ),
    ],
)
def test_the_recipes_block_lies_over_the_jsons(overrides, expected):
    assert (
        slimfit_block(recipe_of(*overrides), {"slimfit": {"freeze": {"rate": 0.5, "policy": "ils"}}})
        == expected
    )


@pytest.mark.parametrize(
    ("world", "micro", "accumulation"), [(1, None, 1), (2, None, 1), (2, 4, 4), (4, 8, 1)]
)
def test_batch_sizes_fit_together(world, micro, accumulation):
    recipe = recipe_of("train_batch_size=32", *([f"micro_batch_size={micro}"] if micro else []))
    config = deepspeed_config(recipe, {}, world)
    assert config["gradient_accumulation_steps"] == accumulation
    assert config["train_micro_batch_size_per_gpu"] * accumulation * world == config["train_batch_size"] == 32


def test_the_recipe_decides_and_says_so():
    base = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "eps": 1e-8, "torch_adam": True}},
        "zero_optimization": {"stage": 2},
    }
    config = deepspeed_config(recipe_of("lr=0.5", "train_batch_size=16", "dtype=bf16"), base, 1)
    assert config["optimizer"]["params"] | {"betas": 0} == {
        "lr": 0.5, "eps": 1e-8, "torch_adam": True, "weight_decay": 0.01, "betas": 0,
    }  # fmt: skip
    assert config["bf16"]["enabled"] is True
    assert config["fp16"]["enabled"] is False
    assert config["zero_optimization"] == {"stage": 2}
    assert replaced_values(base, config) == ["train_micro_batch_size_per_gpu 8 -> 16", "lr 1.0 -> 0.5"]


def test_an_optimizer_without_betas_gets_none():
    config = deepspeed_config(recipe_of(), {"optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}, 1)
    assert config["optimizer"] == {"type": "SGD", "params": {"momentum": 0.9, "lr": 5e-5}}


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"bf16": {"enabled": True}}, "dtype=bf16"),
        ({"fp16": True}, "must be a mapping"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove the block"),
        ({"optimizer": {"params": {}}}, "type and params"),
        ({"optimizer": {"type": "AdamW", "params": 3}}, "params must be a mapping"),
    ],
)
def test_contradictions_are_refused(base, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(recipe_of(), base, 1)


def test_the_json_is_found_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "j.json").write_text('{"a": 1}')
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert load_base(recipe_of("deepspeed=j.json"), tmp_path / "recipes") == {"a": 1}
    with pytest.raises(ConfigError, match=r"no such file: 'k\.json'"):
        load_base(recipe_of("deepspeed=k.json"), tmp_path / "recipes")


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_json_that_is_none(tmp_path, text):
    (tmp_path / "j.json").write_text(text)
    with pytest.raises(ConfigError, match="deepspeed: "):
        load_base(recipe_of(f"deepspeed={tmp_path / 'j.json'}"), None)
