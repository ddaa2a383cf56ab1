from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import slimfit_ds
from slimfit_ds.errors import ConfigError


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
    handle = slimfit_ds.slim(model, {"freeze": {"policy": "ils", "rate": 0.8}, "activations": preset})
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
    handle = slimfit_ds.slim(model, {"freeze": {"policy": "ils", "rate": 0.5}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle.follow(optimizer)
    (active,) = handle.schedule.active
    old = model[active].weight.detach().clone().double()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    moved = (model[active].weight.detach().double() - old).abs()
    expected = (moved / torch.maximum(moved, old.abs())).mean().item()
    assert handle.schedule.statistics == {active: pytest.approx(expected, rel=1e-4)}


def test_remove_restores_the_model():
    model = bert()
    inputs = batch()
    keys = list(model.state_dict())
    model.eval()
    expected = model(**inputs).logits
    handle = slimfit_ds.slim(
        model, {"activations": "minimal", "freeze": {"policy": "ils", "train_biases": False}}
    )
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


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def move(model: nn.Module, handle, optimizer: torch.optim.Optimizer, seed: int) -> None:
    model(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_learning_rates_of_chosen_layers_and_of_what_always_trains():
    """Against plain AdamW with a parameter group of its own rate for each."""
    model, plain = two_layers(), two_layers()
    scales = {"lr_scale": 3.0, "always_lr_scale": 0.5}
    handle = slimfit_ds.slim(
        model, {"freeze": {"policy": "ils", "rate": 0.0, "always_active": ["2*"], **scales}}
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    handle.follow(optimizer)
    rates = {"0.weight": 3e-2, "0.bias": 5e-3, "2.weight": 5e-3, "2.bias": 5e-3}
    reference = torch.optim.AdamW(
        [{"params": [p], "lr": rates[name]} for name, p in plain.named_parameters()], weight_decay=0.1
    )
    for step in range(5):
        move(model, handle, optimizer, step)
        move(plain, None, reference, step)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stale", ["keep", "decay", "reset"])
def test_moments_of_a_layer_that_returns(stale):
    """Against one AdamW per weight, whose moments age in the steps that the weight misses."""
    model, plain = two_layers(), two_layers()
    block = {
        "freeze": {"policy": "random", "rate": 0.5, "train_biases": False},
        "optimizer_states": {"stale_moments": stale},
    }
    handle = slimfit_ds.slim(model, block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    handle.follow(optimizer)
    references = {
        name: torch.optim.AdamW([plain.get_parameter(name)], lr=1e-2, weight_decay=0.0)
        for name in ("0.weight", "2.weight")
    }
    for step in range(12):
        active = handle.active_layers
        move(model, handle, optimizer, step)
        plain.zero_grad()
        plain(torch.randn(3, 4, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        for name, reference in references.items():
            weight = plain.get_parameter(name)
            if name in active:
                reference.step()
            elif stale == "reset":
                reference.state.clear()
            elif stale == "decay" and reference.state:
                kept = weight.detach().clone()
                weight.grad = torch.zeros_like(weight)
                reference.step()
                weight.data.copy_(kept)
    for name in references:
        torch.testing.assert_close(model.get_parameter(name), plain.get_parameter(name), rtol=1e-4, atol=1e-6)


def test_rates_of_single_layers_leave_the_groups_as_they_were():
    """What schedulers hold stays; what the optimizer counts in its groups is kept; nothing is copied."""

    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1
            return super().step(closure)

    model = two_layers()
    handle = slimfit_ds.slim(model, {"freeze": {"policy": "none", "lr_scale": 2.0, "always_lr_scale": 0.5}})
    optimizer = Counting(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    handle.follow(optimizer)
    groups, parameters = optimizer.param_groups, list(optimizer.param_groups[0]["params"])
    for step in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.ones(3, 4)).square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        rate = 0.1 * 0.5**step
        for p, old, gradient in zip(model.parameters(), before, gradients, strict=True):
            factor = 2.0 if p.dim() == 2 else 0.5
            torch.testing.assert_close(p.detach(), old - rate * factor * gradient)
        optimizer.zero_grad()
        scheduler.step()
        assert optimizer.param_groups is groups
        assert len(groups) == 1
        assert all(a is b for a, b in zip(groups[0]["params"], parameters, strict=True))
        assert groups[0]["count"] == step + 1
        assert groups[0]["lr"] == pytest.approx(rate / 2)


def test_an_optimizer_without_a_rate_cannot_have_one_for_single_layers():
    model = two_layers()
    handle = slimfit_ds.slim(model, {"freeze": {"policy": "none", "lr_scale": 2.0}})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = None
    handle.follow(optimizer)
    model(torch.ones(3, 4)).sum().backward()
    with pytest.raises(ValueError, match="SGD works out its learning rate itself"):
        optimizer.step()


def test_an_optimizer_that_lacks_layers_which_train_in_their_turn_is_refused():
    model = bert()
    handle = slimfit_ds.slim(model, {"freeze": {"policy": "ils", "rate": 0.8}})
    # The usual idiom, but waiting layers have requires_grad=False.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ConfigError, match=r"the optimizer lacks .* and .* more, which train in their turn"):
        handle.follow(optimizer)
    handle.follow(torch.optim.SGD(handle.trainable.values(), lr=0.1))


def test_what_the_user_freezes_after_slim_stays_as_it_is():
    model, inputs = bert(), batch()
    handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.6}})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    handle.follow(optimizer)
    mine = model.bert.encoder.layer[1].requires_grad_(False)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    model(**inputs).loss.backward()
    with pytest.warns(UserWarning, match=r"frozen after slim\(\), and stays so: bert.encoder.layer.1"):
        optimizer.step()
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
    for name, value in mine.state_dict().items():
        assert torch.equal(value, before[name]), name
    handle.remove()
    assert not any(p.requires_grad for p in mine.parameters())
    assert all(p.requires_grad for p in model.bert.encoder.layer[0].parameters())


@pytest.mark.parametrize(("policy", "wake"), [("ils", False), ("ils", True), ("static", True)])
def test_what_a_schedule_would_undo_is_refused(policy, wake):
    model = bert()
    handle = slimfit_ds.slim(model, {"freeze": {"policy": policy, "rate": 0.6}})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    handle.follow(optimizer)
    model.requires_grad_(wake)
    if wake:
        model(**batch()).loss.backward()
    with pytest.raises(ConfigError, match="was changed after slim"):
        optimizer.step()
