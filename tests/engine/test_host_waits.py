"""A step waits for the device a fixed number of times, however many layers the model has.

On a GPU each number that the host reads (`item`, `tolist`, a truth value) waits for all work before it. On the CPU of
the tests the reads can be counted.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slimfit_ds

WIDTH = 16
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
# Operators whose results have a size that only the data tells, and reads from C++.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.act(self.up(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, blocks: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


class Reads(TorchDispatchMode):
    """Counts what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._patch = pytest.MonkeyPatch()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        # Random states are bytes on the host, also those of a GPU's generator.
        if name in WAITING and not (name == "equal" and args[0].dtype == torch.uint8):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        for name in READS:
            self._patch.setattr(torch.Tensor, name, self._counted(name, getattr(torch.Tensor, name)))
        return super().__enter__()

    def __exit__(self, *details):
        super().__exit__(*details)
        self._patch.undo()

    def _counted(self, name: str, method):
        def counted(tensor, *args, **kwargs):
            self.counts[name] += 1
            return method(tensor, *args, **kwargs)

        return counted


SLIM = {"freeze": {"policy": "ils", "rate": 0.5}, "optimizer_states": {"inactive": "host"}}


def slim_step(model: Model, preset: str, slim: dict = SLIM):
    handle = slimfit_ds.slim(model, {**slim, "activations": preset})
    # As on a GPU: torch's unfused loop over parameters reads their step counts.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    handle.follow(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(2, 8, WIDTH)).backward()
        optimizer.step()

    return step


def engine_step(model: Model, preset: str, slim: dict = SLIM):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "steps_per_print": None,
        "slimfit": {**slim, "activations": preset},
    }
    engine, *_ = slimfit_ds.initialize(model=model, config=config)

    def step() -> None:
        engine.backward(engine(torch.randn(2, 8, WIDTH)))
        engine.step()

    return step


def reads_of_a_step(make, blocks: int, preset: str, slim: dict = SLIM) -> Counter[str]:
    torch.manual_seed(0)
    step = make(Model(blocks), preset, slim)
    for _ in range(3):
        step()
    with Reads() as reads:
        step()
    return reads.counts


def test_the_counter_counts():
    with Reads() as reads:
        x = torch.arange(3.0)
        x.tolist()
        x[0].item()
        bool(x[0] < 1)
        x.nonzero()
    assert (
        reads.counts["tolist"]
        == reads.counts["item"]
        == reads.counts["nonzero"]
        == reads.counts["__bool__"]
        == 1
    )


PRESETS = ["exact", "paper", "balanced", "minimal"]


@pytest.mark.parametrize("preset", PRESETS)
def test_slim(preset):
    few, many = (reads_of_a_step(slim_step, blocks, preset) for blocks in (2, 6))
    assert many == few
    # The statistics of all layers, together.
    assert sum(many.values()) == 1


@pytest.mark.parametrize("preset", PRESETS)
def test_engine(one_rank, preset):
    few, many = (reads_of_a_step(engine_step, blocks, preset) for blocks in (2, 6))
    assert many == few
    # The norm of the gradients, and the statistics.
    assert sum(many.values()) == 2


@pytest.mark.parametrize("freeze", [{"policy": "auto", "rate": 0.5}, {"policy": "none"}])
def test_what_is_static_is_not_measured(one_rank, freeze):
    """The engine reads the norm of the gradients, the plain loop nothing at all."""
    assert sum(reads_of_a_step(engine_step, 2, "exact", {"freeze": freeze}).values()) == 1
    assert sum(reads_of_a_step(slim_step, 2, "exact", {"freeze": freeze}).values()) == 0


@pytest.mark.parametrize("make", [slim_step, engine_step])
def test_a_new_active_set_touches_only_what_changes(make, one_rank, monkeypatch):
    torch.manual_seed(0)
    model = Model(6)
    step = make(model, "balanced")
    step()  # The proof on the first batch has every weight of a block require grad for a moment.
    touched: list[int] = []
    original = nn.Parameter.requires_grad_

    def counted(parameter, *args):
        touched.append(id(parameter))
        return original(parameter, *args)

    monkeypatch.setattr(nn.Parameter, "requires_grad_", counted)
    changes = 0
    for _ in range(8):
        before = {id(p) for p in model.parameters() if p.requires_grad}
        touched.clear()
        step()
        changed = before ^ {id(p) for p in model.parameters() if p.requires_grad}
        assert sorted(touched) == sorted(changed)
        changes += len(changed)
    assert changes > 8
