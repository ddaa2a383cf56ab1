"""Bytes that a run writes."""

from __future__ import annotations

import pytest

from slimfit_ds.training.disk_space import free_bytes, planned_writes
from slimfit_ds.training.recipe import read_recipe


@pytest.mark.parametrize(
    ("overrides", "checkpoints", "models"),
    [
        (["max_steps=10"], 1, 1),
        (["max_steps=10", "save_steps=5"], 2, 1),
        (["max_steps=10", "save_steps=2"], 2, 1),
        (["max_steps=10", "save_steps=2", "keep_last=3"], 4, 1),
        (["max_steps=10", "save_steps=2", "keep_last=9"], 5, 1),
        (["epochs=2", "save_steps=2", "eval_steps=2", "save_model=false"], 3, 0),
        (["max_steps=10", "eval_steps=2"], 1, 3),
    ],
)
def test_how_many(overrides, checkpoints, models):
    writes = planned_writes(read_recipe(None, ["task=causal_lm", "model=gpt2", *overrides]).recipe, 1000)
    assert (writes.checkpoints, writes.models) == (checkpoints, models)


@pytest.mark.parametrize(("dtype", "checkpoint", "model"), [("fp32", 12000, 4000), ("bf16", 14000, 2000)])
def test_how_large(dtype, checkpoint, model):
    """AdamW: weights, two float32 moments, and a float32 master of 16-bit weights."""
    draft = read_recipe(None, ["task=causal_lm", "model=gpt2", "max_steps=3", f"dtype={dtype}"])
    writes = planned_writes(draft.recipe, 1000)
    assert (writes.checkpoint_bytes, writes.model_bytes) == (checkpoint, model)
    assert writes.total == checkpoint + model


def test_own_checkpoints_make_room(tmp_path):
    before = free_bytes(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "x").write_bytes(b"\0" * (8 << 20))
    # Others write to this disk as well.
    assert free_bytes(tmp_path / "run") == pytest.approx(before, abs=256 << 20)
