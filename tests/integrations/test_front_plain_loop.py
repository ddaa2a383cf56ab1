"""The front in a plain loop: against plain torch with `requires_grad` set by hand, and what the backward pass leaves out."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import BertConfig, BertForSequenceClassification

import slimfit_ds

BLOCKS = 4


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=32,
            num_hidden_layers=BLOCKS,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=8,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (4, 8), generator=generator)
    return {"input_ids": ids, "labels": torch.randint(0, 2, (4,), generator=generator)}


def block_of(name: str) -> int:
    found = re.search(r"encoder\.layer\.(\d+)\.", name)
    return int(found[1]) if found else 0 if "embeddings" in name else BLOCKS


FRONTS_OF_HALF = (0, 2, 0, 2, 0, 0, 2, 0)


@pytest.mark.parametrize("decay", ["keep", "decay"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_it_trains_as_plain_torch_with_flags_set_by_hand(optimizer, decay):
    """Everything above the front trains, vectors too; bits and moments of what rests stay. Two micro-batches a step."""
    if optimizer is torch.optim.SGD and decay == "decay":
        pytest.skip("no moments")
    ours, plain = bert(), bert()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    stepper = optimizer(ours.parameters(), **options)
    block = {"freeze": {"policy": "none", "front": "half"}, "optimizer_states": {"stale_moments": decay}}
    handle = slimfit_ds.slim(ours, block).follow(stepper)
    reference = optimizer(plain.parameters(), **options)
    for step, front in enumerate(FRONTS_OF_HALF):
        assert handle.schedule.front == front
        resting = {n: p.detach().clone() for n, p in ours.named_parameters() if block_of(n) < front}
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(block_of(name) >= front)
            if decay == "decay" and block_of(name) < front and parameter in reference.state:
                # A missed step is one with a gradient of zero, as to the moments.
                state = reference.state[parameter]
                state["exp_avg"] *= 0.9
                state["exp_avg_sq"] *= 0.999
                state["step"] += 1
        for micro in range(2):
            inputs = batch(10 * step + micro)
            assert handle.schedule.front == front
            ours(**inputs).loss.backward()
            plain(**inputs).loss.backward()
        assert {n for n, p in ours.named_parameters() if p.grad is None} == {*resting}
        for each in (stepper, reference):
            each.step()
            each.zero_grad()
        for name, weight in resting.items():
            assert torch.equal(ours.get_parameter(name), weight), name
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6, msg=name)
    handle.remove()
    assert all(p.requires_grad for p in ours.parameters())


class Saved:
    """How many tensors autograd is given to keep, by block."""

    def __init__(self, model: nn.Module):
        self.counts = dict.fromkeys(range(BLOCKS), 0)
        self.backward: list[int] = []
        self._inside: int | None = None
        for number, layer in enumerate(model.bert.encoder.layer):
            layer.register_forward_pre_hook(lambda *_, n=number: setattr(self, "_inside", n))
            layer.register_forward_hook(lambda *_: setattr(self, "_inside", None))
            # Recomputation calls the parts of a block again.
            layer.intermediate.register_forward_hook(lambda *_, n=number: self._computed(n))
        self.again = dict.fromkeys(range(BLOCKS), 0)

    def _computed(self, number: int) -> None:
        self.again[number] += torch._C._current_graph_task_id() != -1

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._inside is not None:
            self.counts[self._inside] += 1
        return tensor


@pytest.mark.parametrize("preset", ["exact", "balanced", "minimal"])
def test_blocks_below_the_front_keep_nothing_and_are_not_computed_again(preset):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = slimfit_ds.slim(
        model, {"freeze": {"rate": 0.8, "front": "half"}, "activations": {"preset": preset}}
    ).follow(optimizer)
    for step, front in enumerate(FRONTS_OF_HALF[:4]):
        seen = Saved(model) if step else None
        if seen is None:
            model(**batch(step)).loss.backward()
        else:
            with torch.autograd.graph.saved_tensors_hooks(seen.pack, lambda t: t):
                loss = model(**batch(step)).loss
            loss.backward()
            assert [n for n, count in seen.counts.items() if count] == list(range(front, BLOCKS))
            again = [n for n, count in seen.again.items() if count]
            assert again == (list(range(front, BLOCKS)) if preset == "minimal" else [])
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()


class Flops(TorchDispatchMode):
    """torch's count without its hooks on modules, which a recomputation inside a backward pass does not bear."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def flops(preset: str, front: str) -> list[int]:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    handle = slimfit_ds.slim(
        model,
        {"freeze": {"rate": 0.9, "front": front}, "activations": {"preset": preset, "proof": False}},
    ).follow(optimizer)
    counted = []
    for step in range(3):
        with Flops() as counter:
            model(**batch(step)).loss.backward()
        counted.append(counter.total)
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return counted[1:]


@pytest.mark.parametrize("preset", ["exact", "minimal"])
def test_a_step_to_the_middle_saves_half_of_the_backward_pass(preset):
    """Counted by torch's formulas; with `minimal` the recomputation is halved too."""
    whole, _ = flops(preset, "none")
    middle, down = flops(preset, "half")
    assert down == whole
    model = bert().eval()
    with torch.no_grad(), Flops() as counter:
        model(**batch(0))
    forward = counter.total
    # The lowest block that trains passes no gradient on, so it is a little less than half.
    assert 0.8 < (middle - forward) / ((whole - forward) / 2) < 1.0


def test_a_resumed_loop_takes_the_fronts_up():
    def made(model: nn.Module):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle = slimfit_ds.slim(model, {"freeze": {"rate": 0.8, "front": "statistics"}}).follow(optimizer)
        return handle, optimizer

    def play(model, handle, optimizer, steps) -> list[int]:
        fronts = []
        for step in steps:
            fronts.append(handle.schedule.front)
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return fronts

    model = bert()
    handle, optimizer = made(model)
    first = play(model, handle, optimizer, range(5))
    saved = json.loads(json.dumps(handle.state_dict()))
    states, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    whole = play(model, handle, optimizer, range(5, 12))
    assert len({*first, *whole}) > 2
    other = bert()
    handle, optimizer = made(other)
    other.load_state_dict(weights)
    optimizer.load_state_dict(states)
    handle.load_state_dict(saved)
    assert play(other, handle, optimizer, range(5, 12)) == whole
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
