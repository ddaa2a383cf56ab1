"""Finding a model, and refusing one that does not fit, by its configuration alone."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.models import (
    build_model,
    fit_model_config,
    head_problems,
    parameter_groups,
    read_model_config,
    resolve_source,
)
from slimfit_ds.training.recipe import read_recipe
from slimfit_ds.training.tasks import Splits, make_task


def task_with_labels(count, **options):
    data = Dataset.from_list([{"text": "x", "label": number} for number in range(count)])
    task = make_task({"name": "sequence_classification", "max_length": 16, **options})
    task.study(Splits(data, data))
    return task


def recipe_for(model, *overrides):
    return read_recipe(
        None, ["task=sequence_classification", f"model={json.dumps(model)}", *overrides]
    ).recipe


def load_model_config(recipe, source, task):
    """The configuration as the checks make it."""
    config = read_model_config(recipe, source)
    if problems := head_problems(config, task):
        raise ConfigError(problems)
    fit_model_config(config, recipe, task)
    return config


@pytest.fixture
def folder(tmp_path, tiny_bert):
    """A saved classifier of three classes."""
    config = AutoConfig.for_model(**tiny_bert, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_packages_folders_and_hub_ids(tmp_path):
    (tmp_path / "m").mkdir()
    assert resolve_source(str(tmp_path / "m")) == str(tmp_path / "m")
    assert resolve_source("google/vit") == "google/vit"
    assert resolve_source("package:slimfit_ds/training").endswith("slimfit_ds/training")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_thing/x", "not installed; pip install no-such-thing"),
        ("package:slimfit_ds/nowhere", "no folder 'nowhere'"),
        ("package:/etc", "not installed"),
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
    ],
)
def test_places_that_are_not_there(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve_source(name)


def test_the_data_decide_the_size_of_a_new_head(tiny_bert):
    task = task_with_labels(4)
    recipe = recipe_for({"config": tiny_bert})
    config = load_model_config(recipe, None, task)
    assert config.num_labels == 4
    assert build_model(recipe, None, config, task).classifier.weight.shape == (4, 16)


def test_a_saved_model_keeps_its_weights(folder):
    task = task_with_labels(3)
    recipe = recipe_for(str(folder))
    config = load_model_config(recipe, str(folder), task)
    ours = build_model(recipe, str(folder), config, task).state_dict()
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_head_of_another_size_is_refused_unless_replaced(folder):
    recipe = recipe_for(str(folder))
    with pytest.raises(ConfigError, match=r"3 outputs, the data need 2.*new_head=true"):
        load_model_config(recipe, str(folder), task_with_labels(2))
    task = task_with_labels(2, new_head=True)
    config = load_model_config(recipe, str(folder), task)
    assert build_model(recipe, str(folder), config, task).classifier.weight.shape == (2, 16)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "vit"}, "'vit' has no head for task 'sequence_classification'"),
        ({"model_type": "brt"}, "must be a model type"),
        ({}, "got None"),
        ({"model_type": "bert", "hiden_size": 8}, "hiden_size is not a value of a bert configuration"),
        ({"model_type": "bert", "hidden_size": "big"}, "model.config"),
        ({"model_type": "bert", "num_labels": 5}, "5 outputs, the data need 2"),
        ({"model_type": "bert", "max_position_embeddings": 8}, "at most the model's 8 positions, got 16"),
    ],
)
def test_configurations_that_do_not_fit(values, message):
    with pytest.raises(ConfigError, match=message):
        load_model_config(recipe_for({"config": values}), None, task_with_labels(2))


def test_decay_spares_biases_and_norms(tiny_bert):
    task = task_with_labels(2)
    recipe = recipe_for({"config": tiny_bert})
    model = build_model(recipe, None, load_model_config(recipe, None, task), task)
    decayed, spared = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(n.endswith("bias") or "LayerNorm" in n for n in (names[id(p)] for p in spared["params"]))
    assert not any(n.endswith("bias") or "LayerNorm" in n for n in (names[id(p)] for p in decayed["params"]))
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_checkpointing_gives_the_same_gradients_with_frozen_embeddings(tiny_bert):
    task = task_with_labels(2)
    tiny_bert |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    gradients = []
    for flag in ("false", "true"):
        recipe = recipe_for({"config": tiny_bert}, f"gradient_checkpointing={flag}")
        torch.manual_seed(0)
        model = build_model(recipe, None, load_model_config(recipe, None, task), task).train()
        model.bert.embeddings.requires_grad_(False)
        model(input_ids=torch.arange(12).view(2, 6), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value)


def test_adapters_leave_only_themselves_and_the_head_trainable(tiny_bert):
    task = task_with_labels(2)
    recipe = recipe_for({"config": tiny_bert}, "lora.r=2")
    model = build_model(recipe, None, load_model_config(recipe, None, task), task)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trained)
    assert any("classifier" in name for name in trained)
    assert all("lora_" in name or "classifier" in name for name in trained)
