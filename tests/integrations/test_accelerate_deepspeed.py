"""`enable_deepspeed`: the Trainer on the SlimFit engine, its JSON filled and checked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
from safetensors.torch import load_file
from test_trainer_callback import assert_same_weights, reference
from trainer_cases import classifier
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from slimfit_ds.errors import ConfigError
from slimfit_ds.integrations import disable_deepspeed, enable_deepspeed
from slimfit_ds.trainable.units import discover

WORKER = Path(__file__).parent / "deepspeed_worker.py"


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "checkpoints"), [(2, "delta"), (3, "whole")])
def test_two_ranks_on_the_engine_train_what_one_process_would(run_ranks, tmp_path, stage, checkpoints):
    classifier().save_pretrained(tmp_path / "base")
    found = run_ranks(WORKER, str(tmp_path), str(stage), checkpoints)
    held = {path.name for path in (tmp_path / "whole" / "checkpoint-5").rglob("*.safetensors")}
    assert ("delta.safetensors" in held, "model.safetensors" in held) == (
        checkpoints == "delta",
        checkpoints == "whole",
    )
    assert found["engine"] == "SlimFitEngine"
    assert found["filled"] == {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 3e-3,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": 0.1,
                "torch_adam": True,
            },
        },
    }
    (sets, rest), (other_sets, other_rest) = found["ranks"]
    assert sets == other_sets
    assert rest == other_rest == sets[5:]
    layers = {layer.name for layer in discover(classifier()).units}
    if stage < 3:  # under stage 3 the weights of a rank are stretches
        for active, moved in zip(sets, found["moved"], strict=True):
            assert set(moved) & layers == set(active)
    model, resumed = classifier(), classifier()
    model.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    resumed.load_state_dict(load_file(tmp_path / "resumed" / "model.safetensors"))
    assert_same_weights(resumed, model)
    # DeepSpeed's AdamW knows one weight decay for all.
    expected, _ = reference(sets, batch=8, decay_all=True)
    assert_same_weights(model, expected, atol=2e-3)


@pytest.fixture
def _enabled():
    enable_deepspeed()
    yield
    disable_deepspeed()


def config(**more):
    return {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-5, "weight_decay": 0.01}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "slimfit": {"freeze": {"policy": "ils", "rate": 0.9}},
        **more,
    }


def finalize(json, hidden_size=16, **more):
    values = {
        "world_size": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_grad_norm": 0.5,
        "learning_rate": 3e-4, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.01,
        "save_on_each_node": False, "fp16": False, "fp16_full_eval": False, "bf16": False, "bf16_full_eval": False,
        "get_warmup_steps": lambda total: 0,
        "output_dir": None,
    }  # fmt: skip
    arguments = SimpleNamespace(**(values | more))
    trainer_config = HfTrainerDeepSpeedConfig(json)
    trainer_config.trainer_config_process(arguments)
    trainer_config.trainer_config_finalize(arguments, classifier(hidden_size), 100)
    return trainer_config.config


@pytest.mark.usefixtures("_enabled")
def test_mismatches_and_settings_that_freezing_refuses_are_one_list():
    json = config(sparse_gradients=True, slimfit={"freeze": {"always_active": ["*nothing_like_it*"]}})
    with pytest.raises(ConfigError) as caught:
        finalize(json)
    text = str(caught.value)
    for part in (
        "train_micro_batch_size_per_gpu=8 in the DeepSpeed JSON, but per_device_train_batch_size=4",
        "gradient_clipping=1.0 in the DeepSpeed JSON, but max_grad_norm=0.5",
        "optimizer.params.lr=5e-05 in the DeepSpeed JSON, but learning_rate=0.0003",
        "sparse_gradients is True",
        "'*nothing_like_it*' matches no layer",
    ):
        assert part in text, text
    assert len(caught.value.problems) == 5


@pytest.mark.usefixtures("_enabled")
def test_a_sound_json_passes_with_its_auto_values_filled():
    agreeing = {"per_device_train_batch_size": 8, "max_grad_norm": 1.0, "learning_rate": 5e-5}
    assert finalize(config(), **agreeing)["zero_optimization"]["reduce_bucket_size"] == 16 * 16


@pytest.mark.usefixtures("_enabled")
def test_a_json_of_this_repository_names_what_the_arguments_have_to_say():
    """Its numbers are launch/train.py's defaults; those of TrainingArguments differ in one."""
    json_file = Path(__file__).parents[2] / "ds_configs" / "slimfit_zero2.json"
    # A smaller model has no part that trains within the rate of that file.
    defaults = {
        "hidden_size": 64,
        "per_device_train_batch_size": 8,
        "max_grad_norm": 1.0,
        "learning_rate": 5e-5,
    }
    with pytest.raises(ConfigError) as caught:
        finalize(str(json_file), **defaults, weight_decay=0.0)
    (problem,) = caught.value.problems
    assert "optimizer.params.weight_decay=0.01 in the DeepSpeed JSON, but weight_decay=0.0" in problem
    assert finalize(str(json_file), **defaults)["slimfit"]["freeze"]["rate"] == 0.9


@pytest.mark.usefixtures("_enabled")
def test_a_json_without_the_block_is_left_to_transformers():
    json = config(sparse_gradients=True)
    del json["slimfit"]
    with pytest.raises(ValueError, match="Please correct the following DeepSpeed config values") as caught:
        finalize(json)
    assert not isinstance(caught.value, ConfigError)


@pytest.mark.usefixtures("_enabled")
def test_auto_is_filled_by_accelerate_outside_of_our_block_only():
    from accelerate.utils import DeepSpeedPlugin

    block = {"freeze": {"policy": "auto", "rate": 0.5}, "memory_budget": "auto"}
    plugin = DeepSpeedPlugin(
        hf_ds_config=config(gradient_clipping="auto", zero_optimization={"stage": 1}, slimfit=block)
    )
    plugin.deepspeed_config_process(must_match=False, gradient_clipping=0.25)
    assert plugin.deepspeed_config["gradient_clipping"] == 0.25
    assert plugin.deepspeed_config["slimfit"] == block


def test_disabling_puts_back_what_was_there():
    from accelerate.utils import DeepSpeedPlugin

    initialize, finalizer = deepspeed.initialize, HfTrainerDeepSpeedConfig.trainer_config_finalize
    process = DeepSpeedPlugin.deepspeed_config_process
    enable_deepspeed()
    assert deepspeed.initialize is not initialize
    disable_deepspeed()
    assert deepspeed.initialize is initialize
    assert HfTrainerDeepSpeedConfig.trainer_config_finalize is finalizer
    assert DeepSpeedPlugin.deepspeed_config_process is process


@pytest.mark.usefixtures("_enabled", "no_ranks")
def test_accelerate_that_leaves_deepspeed_out_is_told(monkeypatch, tmp_path):
    """As under `accelerate launch --cpu`: the run would train everything without a word."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = DeepSpeedPlugin(hf_ds_config={**config(), "slimfit": {}})
    with pytest.raises(ConfigError, match=r"would train without DeepSpeed.*unset ACCELERATE_USE_CPU"):
        Accelerator(deepspeed_plugin=plugin)
    AcceleratorState._reset_state(reset_partial_state=True)
