"""From a live model to settings within a budget."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.errors import ConfigError
from slimfit_ds.planner import budget
from slimfit_ds.planner.budget import resolve_budget, settings_for_budget, workload_of
from slimfit_ds.planner.strategies import Strategy

CONFIG = BertConfig(
    num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=128, vocab_size=500
)
BATCH = {
    "input_ids": torch.zeros(2, 24, dtype=torch.long),
    "attention_mask": torch.ones(2, 24, dtype=torch.long),
}


def test_workload_of_a_live_model():
    CONFIG.num_labels = 5
    workload = workload_of(BertForSequenceClassification(CONFIG), BATCH, 4, "bf16", 2)
    assert (workload.batch, workload.seq, workload.task, workload.labels) == (
        8,
        24,
        "sequence_classification",
        5,
    )
    assert workload.config().hidden_size == 64
    assert workload_of(BertForQuestionAnswering(CONFIG), BATCH, 4, "fp32").task == "question_answering"
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=100))
    assert workload_of(gpt2, BATCH, 1, "fp32").task == "causal_lm"
    masked = {**BATCH, "attention_mask": torch.tensor([[1, 0], [1, 1]])}
    assert workload_of(gpt2, masked, 1, "fp32").padding


def test_a_model_without_configuration_is_refused():
    with pytest.raises(ConfigError, match=r"memory_budget: Linear cannot be simulated"):
        workload_of(torch.nn.Linear(2, 2), BATCH, 1, "fp32")


@pytest.mark.slow
def test_budget_decides_and_the_choice_fits(fake):
    model = BertForSequenceClassification(CONFIG)
    deepspeed = {
        "train_micro_batch_size_per_gpu": 64,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 100_000},
    }
    workload = workload_of(model, BATCH, 64, "fp32")
    strategy = Strategy("x", stage=1, bucket=100_000)

    def choose(budget):
        fixed = {"freeze": {"policy": "ils", "rate": 0.9}}
        return settings_for_budget(budget, model, BATCH, deepspeed, fixed, 1, torch.device("cpu"), fake)

    def peak(block):
        return fake.run(workload, strategy.with_(slimfit=block), "worst", "cpu").peak

    rich, _ = choose(10**12)
    assert rich["activations"]["preset"] == "exact"
    limit = peak(rich) // 2
    tight, reason = choose(limit)
    assert tight["activations"]["preset"] != "exact"
    assert tight["freeze"]["rate"] == 0.9
    assert "next larger" in reason
    SlimFitConfig.parse(tight)
    assert peak(tight) <= limit
    with pytest.raises(ConfigError, match="smallest feasible budget") as error:
        choose(1000)
    smallest = int(str(error.value).split("fixed is ")[1].split()[0])
    assert choose(smallest)[0]


def test_what_is_left_to_auto_is_chosen_for_what_the_device_has_free(fake, monkeypatch, capsys):
    """Everything on the device if it fits, else as many blocks as fit; nothing else of the block changes."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_attention_heads=2, vocab_size=100
        )
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 10_000},
    }

    def chosen(free: int, **weights: object) -> dict:
        monkeypatch.setattr(budget, "_free_bytes", lambda *_: free)
        block = {"freeze": {"rate": 0.8}, "activations": "minimal", "frozen_weights": weights}
        found = resolve_budget({**config, "slimfit": block}, model, BATCH, fake)["slimfit"]
        parsed = SlimFitConfig.parse(found)
        assert not parsed.frozen_weights.undecided
        before = SlimFitConfig.parse(block).model_dump()
        assert {k: v for k, v in parsed.model_dump().items() if k != "frozen_weights"} == {
            k: v for k, v in before.items() if k != "frozen_weights"
        }
        return parsed.frozen_weights.model_dump()

    assert chosen(10**9, live="auto")["live"] == "device"
    capsys.readouterr()
    with pytest.raises(
        ConfigError, match=r"frozen_weights 'auto': 1000 bytes is too small; the smallest feasible budget"
    ) as caught:
        chosen(1000, live="auto")
    least = int(caught.value.problems[0].split("fixed is ")[1].split()[0])
    assert chosen(least, live="auto") == {"live": "host", "resident": 0, "buffers": 2, "columns": "device"}
    block = 4 * (4 * 64 * 64 + 3 * 64 * 256)
    some = chosen(least + 2 * block, live="host", resident="auto")
    assert (some["live"], some["resident"]) == ("host", 2)
    assert chosen(least + 2 * block, live="auto", resident=1)["resident"] == 1


def test_without_a_budget_the_configuration_stays():
    config = {"train_micro_batch_size_per_gpu": 1, "slimfit": {"freeze": {"rate": 0.5}}}
    assert resolve_budget(config, torch.nn.Linear(2, 2), {}) == config
    assert resolve_budget({"a": 1}, torch.nn.Linear(2, 2), {}) == {"a": 1}


@pytest.mark.parametrize("block", [{"memory_budget": "auto"}, {"frozen_weights": {"live": "auto"}}])
def test_auto_needs_a_gpu(block):
    config = {"train_micro_batch_size_per_gpu": 1, "slimfit": block}
    with pytest.raises(ConfigError, match=rf"slimfit.{next(iter(block))}.*auto needs a CUDA device"):
        resolve_budget(config, BertForSequenceClassification(CONFIG), BATCH)
