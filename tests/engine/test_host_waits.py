"""A step waits for the device a fixed number of times, and updates by a fixed number of launches, whatever the model's size.

On a GPU each number that the host reads (`item`, `tolist`, a truth value) waits for all work before it, and so does a copy of
pageable memory. On the CPU of the tests reads can be counted; with the device `meta` in place of the GPU also copies and
launches.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

import slimfit_ds
from slimfit_ds.config import SlimFitConfig
from slimfit_ds.engine import shard_update
from slimfit_ds.engine.sharding import Sharding, build_units
from slimfit_ds.engine.zero12 import FreezeZeroOptimizer
from slimfit_ds.trainable.units import discover

JITFunction = pytest.importorskip("triton.runtime.jit").JITFunction

WIDTH = 16
READS = ("tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
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
        x.nonzero()
    assert reads.counts == {"tolist": 1, "_local_scalar_dense": 1, "nonzero": 1}


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


class ForTrainer(Model):
    """The model as the Trainer wants it: a loss by name."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": super().forward(x)}


def trainer_reads(folder: Path, blocks: int, slim: dict | None) -> Counter[str]:
    """What each further step of the Trainer's loop reads, with the callback or (None) without."""
    counts = []
    for steps in (4, 6):
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, optim="adamw_torch_fused",
            logging_strategy="no", save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        data = [{"x": torch.randn(8, WIDTH)} for _ in range(16)]
        callbacks = [] if slim is None else [slimfit_ds.SlimFitCallback(slim)]
        trainer = Trainer(ForTrainer(blocks), arguments, train_dataset=data, callbacks=callbacks)
        with Reads() as reads:
            trainer.train()
        counts.append(reads.counts)
    return counts[1] - counts[0]


@pytest.mark.parametrize("freeze", [SLIM["freeze"], {"policy": "static", "rate": 0.5}])
def test_the_callback_adds_no_read_but_the_statistics(tmp_path, freeze, monkeypatch):
    # Without the ranks that another test left in the environment, and without accelerate's memory of them.
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(True)
    plain = trainer_reads(tmp_path / "plain", 2, None)
    few, many = (
        trainer_reads(tmp_path / str(blocks), blocks, {"freeze": freeze, "activations": "minimal"})
        for blocks in (2, 6)
    )
    assert many == few
    # In two steps.
    assert sum((many - plain).values()) == (0 if freeze["policy"] == "static" else 2), (plain, many)


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


class Device(TorchDispatchMode):
    """Takes `meta` for a GPU: counts its launches, and what makes the host wait for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._pinned: set[int] = set()
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: self._pin(tensor))

    def _pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self._pinned.add(copy.data_ptr())
        return copy

    @property
    def launched(self):
        """What stands in for `JITFunction.run`."""

        def run(kernel, *args, **kwargs) -> None:
            self.launches[kernel.fn.__name__] += 1

        return run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "_local_scalar_dense" and given[0].is_meta:
            self.waits[name] += 1
            return 1.0
        if name == "_to_copy" and given[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.waits["copy to the host"] += 1
            return torch.ones(given[0].shape, dtype=given[0].dtype)
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not any(t.is_meta for t in (*given, *made)):
            return result
        # The second operand of `copy_` comes from the host, if any does; numbers travel with the launch.
        source = given[-1] if name in ("_to_copy", "copy_") else None
        if source is not None and not source.is_meta:
            if not (source.data_ptr() in self._pinned and (kwargs.get("non_blocking") or True in args)):
                self.waits["copy of pageable memory"] += 1
        elif not func.is_view and not name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
            self.launches[name] += 1
        return result


def meta_step(
    monkeypatch, blocks: int, width: int, stage: int, dtype: torch.dtype, in_kernel: bool
) -> Device:
    """The waits and launches of the step of the engine's optimizer, from the gradients to the new weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(
            *(layer for _ in range(blocks) for layer in (nn.LayerNorm(width), nn.Linear(width, width)))
        ).to(dtype)
    config = SlimFitConfig.parse({"freeze": {"policy": "none"}})
    stock = torch.optim.AdamW(model.parameters(), lr=1e-3)
    units = build_units(model, discover(model), stock.param_groups, True, {})
    sharding = Sharding(units, None, stage > 0, 10**8, 10**8, True, torch.device("meta"))
    scaler = CreateLossScaler(torch.bfloat16, 1.0, False, None)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())  # `meta` has none
    optimizer = FreezeZeroOptimizer(stock, sharding, stage, config, True, scaler, clip=1.0)
    monkeypatch.setattr(torch, "Generator", generator)
    monkeypatch.setattr(shard_update, "runs_in_triton", lambda x: in_kernel)
    device = Device(monkeypatch)
    monkeypatch.setattr(JITFunction, "run", device.launched)
    for boundary in (False, True, False, True):
        loss = model(torch.empty(4, width, dtype=dtype, device="meta")).float().sum()
        loss.backward()
        device.waits.clear()
        device.launches.clear()
        with device:
            optimizer.require_finite(loss.detach())
            optimizer.collect_gradients(boundary)
            if boundary:
                optimizer.step()
                optimizer.zero_grad()
    return device


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_kernel", [True, False])
def test_the_update_grows_with_nothing(one_rank, monkeypatch, stage, dtype, in_kernel):
    few = meta_step(monkeypatch, 2, 32, stage, dtype, in_kernel)
    # Without a kernel temporaries bound what is updated together.
    many = meta_step(monkeypatch, 6, 4096 if in_kernel else 2048, stage, dtype, in_kernel)
    assert many.launches == few.launches
    # The norm of the gradients; the statistics of all layers.
    assert many.waits == few.waits
    assert sum(many.waits.values()) == 2
    assert sum(many.launches.values()) <= 40
