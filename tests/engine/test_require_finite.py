"""A step whose loss is not finite changes nothing: no weight, no state, no schedule, no learning rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import slimfit_ds

pytestmark = pytest.mark.usefixtures("one_rank")


def engine_of(stage: int, dtype: str):
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"stage": stage},
        "slimfit": {"freeze": {"policy": "ils", "rate": 0.5}},
    }
    return slimfit_ds.initialize(
        model=nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
        config=config,
        lr_scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    )[0]


def step(engine, dtype: str, seed: int, losses=(1.0, 1.0)) -> None:
    """One optimizer step of two micro-batches; a gradient is finite even where the loss is said not to be."""
    inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    for loss in losses:
        value = engine(inputs.bfloat16() if dtype == "bf16" else inputs).float().square().mean()
        engine.require_finite(value.detach() * loss)
        engine.backward(value)
        engine.step()


def everything(engine, folder) -> dict:
    """All that a checkpoint knows, and the learning rate and layers of the coming step."""
    from safetensors.torch import load_file

    engine.save_checkpoint(folder, tag="x")
    files = {path.name: load_file(path) for path in (folder / "x").glob("[mo]*.safetensors")}
    tensors = {
        f"{file}:{name}": tensor.float().numpy().tobytes()
        for file, values in files.items()
        for name, tensor in values.items()
    }
    schedule = engine.schedule.state_dict()
    return {**tensors, "lr": engine.get_lr(), "active": sorted(engine.active_layers), "schedule": schedule}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("losses", [(1.0, float("nan")), (float("inf"), 1.0)])
def test_the_step_is_left_out(tmp_path, stage, dtype, losses):
    engine = engine_of(stage, dtype)
    step(engine, dtype, 1)
    before = everything(engine, tmp_path)
    step(engine, dtype, 2, losses)
    assert everything(engine, tmp_path) == before
    assert engine.skipped_steps == 1
    step(engine, dtype, 2)
    after = everything(engine, tmp_path)
    # As if the step had never been: the same as a run without it.
    other = engine_of(stage, dtype)
    step(other, dtype, 1)
    step(other, dtype, 2)
    assert everything(other, tmp_path / "other") == after
    assert after != before
