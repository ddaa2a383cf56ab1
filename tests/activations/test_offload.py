"""Inputs of blocks on the host: the same gradients bit for bit, and memory that is taken once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import batch_for, build, freeze_some, gradients, without_dropout
from torch import nn

from slimfit_ds.activations.apply import compress
from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.activations.offload import ON_MODEL, HostInputs
from slimfit_ds.errors import ConfigError
from slimfit_ds.memory.tracker import MemoryTracker
from slimfit_ds.streaming.copies import Copies

KEPT: dict[str, dict[str, Any]] = {
    "as it is": {"preset": "exact", "operations": {"block": "recompute"}},
    "int8_channel": {"preset": "minimal"},
    "int4": {"preset": "minimal", "operations": {"block": "int4"}},
    "two planes": {"preset": "minimal", "operations": {"block": "int6"}},
    "every second": {"preset": "ultra"},
    "not by rows": {"preset": "exact", "operations": {"block": "topk10"}},
}


@pytest.fixture
def late(monkeypatch) -> None:
    """Copies that are made, in order, when somebody waits for one of them or all are finished."""
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def start(self: Copies, target: torch.Tensor, source: torch.Tensor) -> int:
        if target.numel() and not any(target.data_ptr() == t.data_ptr() for t, _ in waiting):
            target.view(-1).view(torch.uint8).fill_(255)
        waiting.append((target, source))
        return id(target)

    def finish(self: Copies) -> None:
        for target, source in waiting:
            target.copy_(source)
        waiting.clear()

    monkeypatch.setattr(Copies, "start", start)
    monkeypatch.setattr(Copies, "wait", lambda self, started: finish(self))
    monkeypatch.setattr(Copies, "finish", finish)


def both(model: nn.Module, batch: dict[str, torch.Tensor], **settings: Any) -> list[Any]:
    """Loss and gradients with the inputs on the device, and on the host."""
    found = []
    for offload in (False, True):
        handle = compress(model, ActivationsConfig(**settings, offload=offload))
        gradients(model, batch)
        found.append(gradients(model, batch))
        handle.remove()
    return found


@pytest.mark.parametrize("chunk_tokens", [None, 20, 4])
@pytest.mark.parametrize(("name", "kept"), [*(("llama", kept) for kept in KEPT), ("bert", "int8_channel")])
def test_gradients_are_those_of_inputs_on_the_device(name, kept, chunk_tokens, late):
    """The whole batch at once, chunks of samples, tiles of each sample."""
    model = build(name)
    freeze_some(model)
    (loss, expected), (found_loss, found) = both(
        model, batch_for(name), chunk_tokens=chunk_tokens, **KEPT[kept]
    )
    assert torch.equal(loss, found_loss)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], g) for n, g in expected.items())


def pool(model: nn.Module) -> HostInputs:
    return model.__dict__[ON_MODEL]


def test_memory_of_the_host_is_taken_once():
    model, batch = without_dropout(build("llama")), batch_for("llama")
    compress(model, ActivationsConfig(preset="minimal", offload=True))
    gradients(model, batch)
    first = [t.data_ptr() for t in pool(model).host_tensors]
    assert len(first) == 2
    for _ in range(3):
        model(**batch)  # a forward pass that nobody differentiates
        gradients(model, batch)
    assert [t.data_ptr() for t in pool(model).host_tensors] == first
    # Longer sequences take the place of shorter ones.
    longer = {key: torch.cat([value, value], 1) for key, value in batch.items()}
    gradients(model, longer)
    assert sum(t.nbytes for t in pool(model).host_tensors) < 2.1 * 2 * 4 * 20 * 32 * 1.2


def test_a_second_backward_pass_needs_the_graph_kept():
    model, batch = without_dropout(build("llama")), batch_for("llama")
    compress(model, ActivationsConfig(preset="minimal", offload=True))
    loss = model(**batch).loss
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in model.named_parameters()}
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * first[name])
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        loss.backward()


def test_the_device_keeps_nothing_of_the_blocks():
    model, batch = without_dropout(build("llama")), batch_for("llama", rows=8)
    kept = []
    for offload in (False, True):
        handle = compress(model, ActivationsConfig(preset="minimal", offload=offload))
        gradients(model, batch)
        with MemoryTracker(model) as tracker:
            gradients(model, batch)
        kept.append(tracker.report())
        handle.remove()
    on_device, on_host = kept
    rows = 8 * 10
    expected = (
        2 * rows * (32 + 2 + 2)
    )  # two blocks: a byte for each element, a scale of 32, a size of the row
    assert on_device.saved_activations_host == 0
    assert expected <= on_host.saved_activations_host <= expected + 2 * (2 * 4 * 32 + 5 * 64)
    saved = on_device.saved_activations_static - on_host.saved_activations_static
    assert saved >= expected


def test_a_copy_of_the_model_has_a_pool_of_its_own():
    model, batch = without_dropout(build("llama")), batch_for("llama")
    compress(model, ActivationsConfig(preset="minimal", offload=True))
    gradients(model, batch)
    other = copy.deepcopy(model)
    _, found = gradients(other, batch)
    assert all(torch.equal(found[n], g) for n, g in gradients(model, batch)[1].items())
    assert len(pool(other).host_tensors) == 2
    assert pool(other) is not pool(model)


def test_where_nothing_is_recomputed_it_is_refused():
    with pytest.raises(ConfigError, match="no block is recomputed"):
        compress(build("llama"), ActivationsConfig(preset="balanced", offload=True))
