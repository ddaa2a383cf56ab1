"""Steps of a Trainer measured, against element counts; DeepSpeed's are in tests/launch/test_compare.py."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from slimfit_ds.integrations.measure import MeasureSteps


def trainer(folder, callback):
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64, vocab_size=60
    )
    rows = [{"input_ids": torch.full((12,), i), "labels": i % 2} for i in range(16)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    return Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows, callbacks=[callback])


def test_last_steps_are_tracked_and_the_others_timed(tmp_path):
    plain = dist.all_reduce
    measure = MeasureSteps(warmup=1, tracked=2)
    run = trainer(tmp_path, measure)
    run.train()
    assert dist.all_reduce is plain
    measure.write(tmp_path)
    numbers = json.loads((tmp_path / "measures.json").read_text())
    weights = sum(p.numel() for p in run.model.parameters())
    assert (numbers["steps"], numbers["timed_steps"], numbers["parameters"]) == (4, 1, weights)
    assert numbers["highest"]["gradients"] == 4 * weights
    tensors = len(list(run.model.parameters()))
    assert (
        numbers["highest"]["optimizer"] == 8 * weights + 4 * tensors
    )  # two moments; a step count for each tensor
    assert numbers["memory"]["peak"] > 16 * weights
    assert numbers["seconds_per_step"] > 0
    assert numbers["bytes_per_step"] == 0  # one process
    assert (tmp_path / "memory_of_one_step.png").stat().st_size > 1000


def test_nothing_tracked_is_an_error(tmp_path):
    measure = MeasureSteps()
    try:
        with pytest.raises(RuntimeError, match="no step was tracked"):
            measure.write(tmp_path)
    finally:
        measure.on_train_end(None, None, None)


def test_too_late_to_count_what_deepspeed_sends(one_rank):
    measure = MeasureSteps()
    measure.trainer = SimpleNamespace(deepspeed=object())
    try:
        with pytest.raises(RuntimeError, match="after the process group"):
            measure.on_train_begin(SimpleNamespace(deepspeed="x"), None, None)
    finally:
        measure.on_train_end(None, None, None)
