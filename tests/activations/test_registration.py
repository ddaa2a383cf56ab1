"""Frameworks that call a checkpoint function get ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import batch_for, build, freeze_some, gradients, relative_error, without_dropout
from torch import nn

from slimfit_ds.activations.registration import deepspeed_checkpointing, enable_gradient_checkpointing


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_transformers_checkpointing_with_frozen_embeddings(name):
    model = without_dropout(build(name))
    model.get_input_embeddings().requires_grad_(False)
    freeze_some(model)
    model.get_input_embeddings().requires_grad_(False)
    batch = batch_for(name)
    loss, expected = gradients(model, batch)
    enable_gradient_checkpointing(model, codec="exact", chunk_tokens=20)
    found_loss, found = gradients(model, batch)
    assert torch.equal(found_loss, loss)
    assert relative_error(found, expected) < 2e-6
    enable_gradient_checkpointing(model, codec="int8")
    assert 1e-5 < relative_error(gradients(model, batch)[1], expected) < 0.05
    model._set_gradient_checkpointing(False)
    assert relative_error(gradients(model, batch)[1], expected) == 0


def test_a_model_without_a_seam_is_refused():
    with pytest.raises(TypeError, match="no transformers model"):
        enable_gradient_checkpointing(nn.Linear(2, 2))


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_calls_deepspeed_checkpointing(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    deepspeed = pytest.importorskip("deepspeed")
    original = deepspeed.checkpointing.checkpoint
    first, second = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
    first.weight.requires_grad_(False)
    x = torch.randn(4, 3, 8, dtype=torch.float64)

    def model(t, call):
        return call(lambda s: second(torch.tanh(first(s))), t).square().sum()

    with deepspeed_checkpointing(codec="exact", chunk_tokens=6):
        model(x, deepspeed.checkpointing.checkpoint).backward()
    found = [p.grad for p in (first.bias, second.weight, second.bias)]
    first.zero_grad()
    second.zero_grad()
    model(x, lambda function, *args: function(*args)).backward()
    torch.testing.assert_close(found, [p.grad for p in (first.bias, second.weight, second.bias)])
    assert deepspeed.checkpointing.checkpoint is original


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["lean", "minimal"])
def test_zero3_partitioned_parameters(preset, tmp_path):
    """Two ranks, two accumulation steps: the weights after three steps are those of an uncompressed run."""
    worker = Path(__file__).with_name("zero3_worker.py")
    results = {}
    for variant in ("exact", preset):
        target = tmp_path / f"{variant}.json"
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(worker), variant, str(target)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
        results[variant] = json.loads(target.read_text())
    assert results[preset]["losses"][0] == results["exact"]["losses"][0]
    for name, expected in results["exact"]["gradients"].items():
        found, exact = torch.tensor(results[preset]["gradients"][name]), torch.tensor(expected)
        assert (found - exact).norm() <= 0.02 * exact.norm() + 1e-5, name
