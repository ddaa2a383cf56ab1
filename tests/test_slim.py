from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import slimfit_ds
from slimfit_ds.config import ConfigError


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=8,
        )
    )


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 32, (4, 8)), "labels": torch.randint(0, 2, (4,))}


@pytest.mark.parametrize("preset", ["exact", "minimal"])
def test_frozen_layers_stay_and_all_layers_train_in_turn(preset):
    model = bert()
    handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.8}, "activations": preset})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    handle.follow(optimizer)
    trained: set[str] = set()
    names = set(handle.schedule.names)
    for _ in range(12):
        active = handle.active_layers
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        trained |= active
        for name in names:
            assert torch.equal(model.get_parameter(name), before[name]) == (name not in active), name
    assert trained == names


def test_the_statistic_is_how_far_the_weight_moved():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = slimfit_ds.slim(model, {"freeze": {"policy": "none"}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.follow(optimizer)
    old = model[0].weight.detach().clone().double()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    moved = (model[0].weight.detach().double() - old).abs()
    expected = (moved / torch.maximum(moved, old.abs())).mean().item()
    assert handle.schedule.statistics[0] == pytest.approx(expected, rel=1e-4)


def test_remove_restores_the_model():
    model = bert()
    inputs = batch()
    keys = list(model.state_dict())
    model.eval()
    expected = model(**inputs).logits
    handle = slimfit_ds.slim(model, {"activations": "minimal", "freeze": {"train_biases": False}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.follow(optimizer)
    assert list(model.state_dict()) == keys
    handle.remove()
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(**inputs).logits, expected)
    model.train()
    model(**inputs).loss.backward()
    optimizer.step()
    assert all(p.requires_grad for p in model.parameters())


def test_bad_blocks_are_refused():
    with pytest.raises(ConfigError, match=r"slimfit\.freeze\.rate must be in"):
        slimfit_ds.slim(bert(), {"freeze": {"rate": 7}})
