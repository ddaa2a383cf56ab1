"""A Trainer's checkpoints of what trained: resumed, best model, refused, and never taken for a model."""

from __future__ import annotations

import copy
import functools
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from trainer_cases import Sentences, arguments, classifier
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer

from slimfit_ds import SlimFitCallback
from slimfit_ds.cli import main
from slimfit_ds.deltas.base import DeltaError
from slimfit_ds.deltas.delta import read_delta
from slimfit_ds.deltas.load import load_merged
from slimfit_ds.errors import ConfigError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def trainer_of(folder, policy="static", checkpoints="delta", output="out", **more) -> Trainer:
    base = folder / "base"
    if not base.exists():
        classifier().save_pretrained(base)
    model = BertForSequenceClassification.from_pretrained(base)
    block = {"freeze": {"policy": policy, "rate": 0.7}, "checkpoints": checkpoints, "activations": "exact"}
    options = {"save_strategy": "steps", "save_steps": 4, **more}
    return Trainer(
        model,
        arguments(folder / output, **options),
        train_dataset=Sentences(),
        eval_dataset=Sentences(16),
        callbacks=[SlimFitCallback(block)],
    )


def assert_same(mine, theirs) -> None:
    theirs = theirs.state_dict()
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("policy", ["static", "ils"])
def test_a_run_goes_on_as_one_with_whole_checkpoints_does(tmp_path, policy):
    whole = trainer_of(tmp_path, policy, "whole", output="whole")
    whole.train()
    first = trainer_of(tmp_path, policy)
    first.train()
    assert_same(first.model, whole.model)
    resumed = trainer_of(tmp_path, policy)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert resumed.state.log_history[-2]["step"] == 12
    assert_same(resumed.model, whole.model)


def test_a_run_of_whole_checkpoints_goes_on_from_a_delta(tmp_path):
    first = trainer_of(tmp_path)
    first.train()
    other = trainer_of(tmp_path, checkpoints="whole", output="whole")
    other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert_same(other.model, first.model)
    checkpoint = tmp_path / "whole" / "checkpoint-12"
    assert_same(BertForSequenceClassification.from_pretrained(checkpoint), first.model)


def test_a_delta_that_the_model_could_not_read_is_refused(tmp_path):
    """The Trainer itself would load the norms and the head, and nothing else."""
    trainer = trainer_of(tmp_path)
    trainer.train()
    assert "slimfit_delta_read" not in vars(trainer.model)
    with pytest.raises(ConfigError, match="make a new Trainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))


def test_after_a_run_the_model_is_as_any_other(tmp_path):
    first = trainer_of(tmp_path)
    model = first.model
    model.save_pretrained = another = functools.partial(type(model).save_pretrained, model)
    first.train()
    assert model.save_pretrained is another
    del model.save_pretrained
    assert_same(pickle.loads(pickle.dumps(model)), model)
    for name, callbacks in (("whole", [SlimFitCallback({"freeze": {"rate": 0.7}})]), ("plain", [])):
        options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
        later = Trainer(
            model,
            arguments(tmp_path / name, **options),
            train_dataset=Sentences(),
            callbacks=callbacks,
        )
        later.train()
        checkpoint = tmp_path / name / "checkpoint-2"
        assert_same(BertForSequenceClassification.from_pretrained(checkpoint), model)


def test_the_model_of_model_init_is_the_one_that_is_saved(tmp_path):
    classifier().save_pretrained(tmp_path / "base")
    trainer = Trainer(
        args=arguments(tmp_path / "out", max_steps=2, save_strategy="steps", save_steps=2),
        model_init=lambda: BertForSequenceClassification.from_pretrained(tmp_path / "base"),
        train_dataset=Sentences(),
        callbacks=[SlimFitCallback({"freeze": {"rate": 0.7}, "checkpoints": "delta"})],
    )
    trainer.train()
    for file in (tmp_path / "out" / "checkpoint-2" / "model.safetensors", tmp_path / "out"):
        assert_same(load_merged(tmp_path / "base", read_delta(file)), trainer.model)


def test_a_checkpoint_holds_what_trained_and_is_no_model(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-12"
    saved = load_file(checkpoint / "model.safetensors")
    assert any(name.endswith("weight_columns") for name in saved)
    assert not any(name.endswith("query.weight") for name in saved)
    with pytest.raises(Exception, match="no model, only what trained of one: slimfit-ds merge"):
        BertForSequenceClassification.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match="model type `slimfit_delta`"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)
    merged = load_merged(tmp_path / "base", read_delta(checkpoint / "model.safetensors"))
    assert_same(merged, trainer.model)
    assert_same(load_merged(tmp_path / "base", read_delta(tmp_path / "out")), trainer.model)
    copied = copy.deepcopy(trainer.model)
    torch.nn.init.zeros_(copied.classifier.weight)
    copied.save_pretrained(tmp_path / "copied")
    assert_same(BertForSequenceClassification.from_pretrained(tmp_path / "copied"), copied)
    trainer.save_model(str(tmp_path / "whole"))
    assert_same(BertForSequenceClassification.from_pretrained(tmp_path / "whole"), trainer.model)


def test_the_best_model_comes_back_whole(tmp_path):
    """Under ils layers have trained since that the best checkpoint does not hold."""
    options = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    trainer = trainer_of(tmp_path, "ils", greater_is_better=True, metric_for_best_model="loss", **options)
    trainer.train()
    # The largest loss is that of the first checkpoint.
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = load_merged(tmp_path / "base", read_delta(tmp_path / "out" / "checkpoint-4" / "model.safetensors"))
    assert_same(best, trainer.model)


def test_a_second_run_of_a_model_keeps_what_the_first_has_learned(tmp_path):
    model = trainer_of(tmp_path).model
    for seed in (0, 3):  # other columns
        block = {"freeze": {"rate": 0.7, "seed": seed}, "checkpoints": "delta", "activations": "exact"}
        Trainer(
            model,
            arguments(tmp_path / "out", max_steps=2),
            train_dataset=Sentences(),
            callbacks=[SlimFitCallback(block)],
        ).train()
    assert_same(load_merged(tmp_path / "base", read_delta(tmp_path / "out")), model)


def test_another_base_is_refused(tmp_path):
    trainer_of(tmp_path).train()
    shutil.rmtree(tmp_path / "base")
    torch.manual_seed(1)
    other = classifier()
    torch.nn.init.normal_(other.classifier.weight)
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(DeltaError, match="sha256"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_a_model_without_a_base_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the model has no base"):
        Trainer(
            classifier(),
            arguments(tmp_path),
            train_dataset=Sentences(),
            callbacks=[SlimFitCallback({"checkpoints": "delta"})],
        )


def test_a_folder_with_the_base_in_it_is_no_output_folder(tmp_path):
    with pytest.raises(ConfigError, match="choose another output_dir"):
        trainer_of(tmp_path, output="base")
    whole = trainer_of(tmp_path, checkpoints="whole")
    whole.train()
    (tmp_path / "base").rename(tmp_path / "first")
    (tmp_path / "base").symlink_to(tmp_path / "out" / "checkpoint-4")
    with pytest.raises(ConfigError, match="choose another output_dir"):
        trainer_of(tmp_path)


def test_a_file_of_the_user_is_not_replaced_at_the_end(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "delta.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no delta"):
        trainer_of(tmp_path)


def test_merge_takes_the_folder_of_a_checkpoint(tmp_path, capsys):
    trainer = trainer_of(tmp_path)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-12"
    assert main(["merge", str(tmp_path / "base"), str(checkpoint), str(tmp_path / "merged")]) == 0
    assert_same(BertForSequenceClassification.from_pretrained(tmp_path / "merged"), trainer.model)
    assert main(["merge", str(checkpoint), str(tmp_path / "base"), str(tmp_path / "wrong")]) == 2
    assert "is no delta" in capsys.readouterr().err


@pytest.mark.parametrize("checkpoints", ["whole", "delta"])
@pytest.mark.parametrize("changes", [{"rate": 0.5}, {"seed": 3}], ids=str)
def test_other_columns_are_refused(tmp_path, checkpoints, changes):
    """Their moments are those of other weights, of the same shape where only the seed is another."""
    trainer_of(tmp_path, checkpoints=checkpoints, max_steps=4).train()
    model = BertForSequenceClassification.from_pretrained(tmp_path / "base")
    block = {"freeze": {"rate": 0.7, **changes}, "activations": "exact"}
    other = Trainer(
        model,
        arguments(tmp_path / "out"),
        train_dataset=Sentences(),
        callbacks=[SlimFitCallback(block)],
    )
    with pytest.raises(ConfigError, match="trains other columns of"):
        other.train(resume_from_checkpoint=True)


def test_another_policy_is_refused_by_name(tmp_path):
    trainer_of(tmp_path, max_steps=4).train()
    with pytest.raises(ConfigError, match="policy 'static', this run of 'ils'"):
        trainer_of(tmp_path, "ils").train(resume_from_checkpoint=True)
