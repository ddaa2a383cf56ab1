"""`memory_budget` at `slimfit_ds.initialize`: what is chosen, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification

import slimfit_ds
from slimfit_ds.engine.memory_roots import engine_roots
from slimfit_ds.errors import ConfigError
from slimfit_ds.memory.tracker import MemoryTracker

pytestmark = [pytest.mark.usefixtures("one_rank"), pytest.mark.slow]


class Sentences(Dataset):
    def __len__(self) -> int:
        return 12 * 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.full((32,), index % 60), "labels": torch.tensor(index % 2)}


def make(budget, data=None, **freeze):
    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    settings = {
        "train_micro_batch_size_per_gpu": 32,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 100000, "allgather_bucket_size": 100000},
        "slimfit": {"memory_budget": budget, "freeze": freeze},
    }
    return slimfit_ds.initialize(
        model=BertForSequenceClassification(config), config=settings, training_data=data
    )


def test_a_rich_budget_leaves_activations_exact_and_a_tight_one_does_not():
    rich, *_ = make("100GB", Sentences())
    assert rich.slimfit_config.activations.preset == "exact"
    tight, *_ = make("9MB", Sentences(), rate=0.9)
    assert tight.slimfit_config.activations.preset != "exact"
    assert tight.slimfit_config.freeze.rate == 0.9
    # The run stays under what it was given, every live storage counted.
    for batch, _ in zip(tight.training_dataloader, range(12), strict=False):
        with MemoryTracker(tight.module, engine_roots(tight)) as tracker:
            tight.backward(tight(**batch).loss)
            with tracker.phase("step"):
                tight.step()
        assert tracker.report().peak <= 9e6
    assert tight.global_steps > 0


def test_an_impossible_budget_names_the_smallest_feasible_one():
    with pytest.raises(ConfigError, match=r"is too small; the smallest feasible budget"):
        make("1kB", Sentences())


def test_without_data_a_batch_cannot_be_known():
    with pytest.raises(ConfigError, match=r"memory_budget and frozen_weights .* need training_data"):
        make("1GB")
