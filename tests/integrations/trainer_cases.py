"""A tiny classifier, its data and arguments: what the tests of this folder train, in one process or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

EXAMPLES, TOKENS, WORDS = 64, 8, 32


class Sentences(Dataset):
    """Random tokens whose label can be learned."""

    def __init__(self, count: int = EXAMPLES):
        random = torch.Generator().manual_seed(1)
        self._ids = torch.randint(0, WORDS, (count, TOKENS), generator=random)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self._ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 2}

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        rows = [self[index] for index in indices]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def classifier(hidden_size: int = 16) -> nn.Module:
    """Two blocks without dropout, so that the order of random numbers does not matter."""
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS,
            hidden_size=hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=2 * hidden_size,
            max_position_embeddings=TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    """Twelve steps in the order of the data set."""
    options: dict[str, Any] = {
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(options | more))


class Watch(TrainerCallback):
    """What moved in each step, bit by bit, and what was meant to; added after the callback under test."""

    def __init__(self, active: Any):
        self._active = active
        self.sets: list[list[str]] = []
        self.moved: list[list[str]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.sets.append(sorted(self._active()))
        self.weights.append({n: p.detach().clone() for n, p in kwargs["model"].named_parameters()})

    def on_step_end(self, args, state, control, **kwargs):
        before = self.weights[-1]
        now = dict(kwargs["model"].named_parameters())
        self.moved.append(sorted(name for name in before if not torch.equal(before[name], now[name])))
