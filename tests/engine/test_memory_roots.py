"""Memory of engines: a private name of DeepSpeed that is gone is an error, never bytes that are missing."""

from __future__ import annotations

from types import SimpleNamespace

import deepspeed
import pytest
import torch
from torch import nn

from slimfit_ds.engine.memory_roots import engine_roots, is_offloaded


def stock(stage: int, dtype: str = "bf16"):
    config = {
        "train_batch_size": 1,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 1000,
            "stage3_prefetch_bucket_size": 1000,
        },
        dtype: {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    }
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 1))
    return deepspeed.initialize(model=model, config=config)[0]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_masters_are_seen_and_a_missing_name_is_an_error(stage):
    engine = stock(stage)
    assert not is_offloaded(engine.optimizer)
    numel = 40 * 30 + 30 + 31
    masters = {t.untyped_storage().data_ptr(): t for t in engine_roots(engine)["optimizer"]()}.values()
    floats = sum(t.numel() for t in masters if t.dtype == torch.float32 and t.dim())
    assert numel <= floats <= 3.1 * numel  # moments may or may not be made at construction
    name = {
        0: "fp32_groups",
        1: "single_partition_of_fp32_groups",
        3: "fp32_partitioned_groups_flat",
    }[stage]
    delattr(engine.optimizer, name)
    with pytest.raises(RuntimeError, match=f"has no attribute '{name}'"):
        engine_roots(engine)


def test_an_unknown_optimizer_is_an_error():
    class Novel:
        pass

    with pytest.raises(RuntimeError, match=r"optimizer Novel is not known .*memory_roots"):
        engine_roots(SimpleNamespace(optimizer=Novel()))


def test_an_optimizer_of_torch_needs_no_table():
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    assert not is_offloaded(optimizer)
    assert list(engine_roots(SimpleNamespace(optimizer=optimizer))["optimizer"]()) == []
