"""Finding a model, and refusing one that does not fit, by its configuration alone."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks import Splits, make_task
from slimfit_ds.tasks.models import build_model, fit_config, read_model_config, resolve_source
from slimfit_ds.tasks.recipe import LoraOptions, read_recipe


def task_with_labels(count, **options):
    data = Dataset.from_list([{"text": "x", "label": number} for number in range(count)])
    task = make_task({"name": "sequence_classification", "max_length": 16, **options})
    task.study(Splits(data, data))
    return task


@pytest.fixture
def fitted(tmp_path):
    """Reads and fits the configuration of a model."""

    def fit(model, task):
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"task": "sequence_classification", "model": model}))
        recipe, _ = read_recipe(["--config", str(path)])
        source, config = read_model_config(recipe)
        fit_config(config, recipe, task)
        return source, config

    return fit


@pytest.fixture
def folder(tmp_path, tiny_bert):
    """A saved classifier of three classes."""
    config = AutoConfig.for_model(**tiny_bert, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("attention", ["eager", "sdpa", None])
def test_attention_is_the_one_that_is_asked_for(folder, attention):
    config, task = AutoConfig.from_pretrained(folder), task_with_labels(3)
    for source in (str(folder), None):
        model = build_model(source, config, task, torch.float32, attention=attention)
        assert model.config._attn_implementation == (attention or "sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may be there")
def test_attention_that_is_not_there_is_refused(tmp_path, folder):
    path = tmp_path / "recipe.yaml"
    values = {"task": "sequence_classification", "model": str(folder)}
    path.write_text(json.dumps({**values, "attn_implementation": "flash_attention_2"}))
    recipe, _ = read_recipe(["--config", str(path)])
    with pytest.raises(ConfigError, match="flash_attention_2 is not installed"):
        fit_config(read_model_config(recipe)[1], recipe, task_with_labels(3))


def test_packages_folders_and_hub_ids(tmp_path):
    (tmp_path / "m").mkdir()
    assert resolve_source(str(tmp_path / "m")) == str(tmp_path / "m")
    assert resolve_source("google/vit") == "google/vit"
    assert resolve_source("package:slimfit_ds/tasks").endswith("slimfit_ds/tasks")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no_such_thing/x", "not installed; pip install no-such-thing"),
        ("package:slimfit_ds/nowhere", "has no 'nowhere'"),
        ("package:/etc", "not installed"),
        ("./nowhere", "no such folder"),
        ("/nowhere/at/all", "no such folder"),
        ("nowhere.gguf", "no such folder or GGUF file"),
    ],
)
def test_places_that_are_not_there(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve_source(name)


def test_the_data_decide_the_size_of_a_new_head(fitted, tiny_bert):
    task = task_with_labels(4)
    source, config = fitted({"config": tiny_bert}, task)
    model = build_model(source, config, task, torch.bfloat16)
    assert model.classifier.weight.shape == (4, 16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_saved_model_keeps_its_weights(fitted, folder):
    task = task_with_labels(3)
    source, config = fitted(str(folder), task)
    ours = build_model(source, config, task, torch.float32).state_dict()
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_head_of_another_size_is_refused_unless_replaced(fitted, folder):
    with pytest.raises(ConfigError, match=r"3 outputs, the data need 2.*new_head=true"):
        fitted(str(folder), task_with_labels(2))
    task = task_with_labels(2, new_head=True)
    source, config = fitted(str(folder), task)
    assert build_model(source, config, task, torch.float32).classifier.weight.shape == (2, 16)


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
        # RoBERTa counts positions from 2: two of its rows are never reached.
        ({"model_type": "roberta", "max_position_embeddings": 17}, "at most the model's 15 positions"),
    ],
)
def test_configurations_that_do_not_fit(fitted, values, message):
    with pytest.raises(ConfigError, match=message):
        fitted({"config": values}, task_with_labels(2))


def test_adapters_leave_only_themselves_and_the_head_trainable(fitted, tiny_bert):
    task = task_with_labels(2)
    source, config = fitted({"config": tiny_bert}, task)
    model = build_model(source, config, task, torch.float32, LoraOptions(r=2))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any("lora_A" in name for name in trained)
    assert any("classifier" in name for name in trained)
    assert all("lora_" in name or "classifier" in name for name in trained)
