"""The update in pieces against the update in one piece (which tests of the engine compare with AdamW)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slimfit_ds
from slimfit_ds.engine import shard_update

pytestmark = pytest.mark.usefixtures("one_rank")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 5), nn.LayerNorm(5), nn.Linear(5, 1))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, generator=generator) for _ in range(4)]


def trained(elements, monkeypatch, dtype=torch.float32):
    """Weights and statistics after four steps of three of the four layers, updated so many elements at a time."""
    monkeypatch.setattr(shard_update, "_CPU_ELEMENTS", elements)
    net = model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": dtype is torch.bfloat16},
        "steps_per_print": None,
        "slimfit": {"freeze": {"policy": "ils", "rate": 0.25}},
    }
    engine, *_ = slimfit_ds.initialize(model=net, model_parameters=net.parameters(), config=config)
    for x in batches():
        engine.backward(engine(x.to(dtype)).float().square().mean())
        engine.step()
    return [p.detach().clone() for p in engine.module.parameters()], dict(engine.update_statistics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("elements", [1, 7, 64])
def test_pieces_give_the_bits_of_one_piece(elements, dtype, monkeypatch):
    whole, statistics = trained(1 << 24, monkeypatch, dtype)
    found, in_pieces = trained(elements, monkeypatch, dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))
    assert in_pieces == pytest.approx(statistics, rel=1e-5)
    assert len(statistics) == 4
