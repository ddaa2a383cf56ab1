"""The fused Adam step against torch.optim and the formulas of the statistics.

On a CUDA device the kernel runs compiled; else one test runs this file again in Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slimfit_ds.engine import shard_update
from slimfit_ds.engine.sharding import FlatUnit
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.optim.rules import RULES

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernel = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs CUDA or Triton's interpreter"
)
SIZES = (1, 2047, 2048, 5000)
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}


def tensors(seed: int) -> list[torch.Tensor]:
    """Of these sizes, the last but one not aligned."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n, generator=generator) for n in SIZES]
    moved = [
        torch.cat([t[:1], t]).to(DEVICE)[1:] if n == 2048 else t.to(DEVICE)
        for n, t in zip(SIZES, made, strict=True)
    ]
    assert moved[2].data_ptr() % 16
    return moved


@kernel
@pytest.mark.parametrize("decoupled", [True, False])
def test_three_steps_are_those_of_torch(decoupled):
    from slimfit_ds.optim.triton_adam import adam_step

    weights = tensors(0)
    plain = [torch.nn.Parameter(w.double()) for w in weights]
    optimizer = (torch.optim.AdamW if decoupled else torch.optim.Adam)(plain, **OPTIONS)
    states = {name: [torch.zeros_like(w) for w in weights] for name in ("exp_avg", "exp_avg_sq")}
    for step in (1, 2, 3):
        gradients = tensors(step)
        for parameter, gradient in zip(plain, gradients, strict=True):
            parameter.grad = 0.5 * gradient.double()
        optimizer.step()
        adam_step(gradients, weights, states, [step] * 4, OPTIONS, decoupled=decoupled, factor=0.5)
    for mine, theirs in zip(weights, plain, strict=True):
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=1e-5, atol=1e-6)


@kernel
def test_sums_are_the_statistic_of_the_update_and_scales_apply_to_it():
    from slimfit_ds.optim.triton_adam import adam_step

    weights = tensors(0)
    weights[3][:100] = 0
    before = [w.clone() for w in weights]
    states = {name: [torch.zeros_like(w) for w in weights] for name in ("exp_avg", "exp_avg_sq")}
    steps, scales = [1, 7, 1, 30], [1.0, 0.5, 0.0, 2.0]
    sums = adam_step(tensors(1), weights, states, steps, OPTIONS, decoupled=True, scales=scales)
    assert torch.equal(weights[2], before[2])
    for found, old, new in zip(sums, before, weights, strict=True):
        change, whole = (new.double() - old.double()).abs(), old.double().abs()
        expected = (change / torch.maximum(change, whole).clamp_min(1e-300)).sum()
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-9)


def run_updater(dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[int, float]]:
    """Weights and statistics after two steps of two layers and a bundle."""
    parameters = [torch.nn.Parameter(t.to(dtype)) for t in tensors(0)]
    optimizer = torch.optim.AdamW(parameters, **OPTIONS)
    units = [
        FlatUnit(0, ["a"], parameters[:1], 0, 0),
        FlatUnit(1, ["b"], parameters[1:2], 0, 1),
        FlatUnit(2, ["c", "d"], parameters[2:], 0, None),
    ]
    updater = shard_update.ShardUpdater(
        units, optimizer, RULES["AdamW"], OptimizerStatesConfig(), torch.device(DEVICE)
    )  # fmt: skip
    updater.lr_factors = {1: 0.5}
    for step in (1, 2):
        given = tensors(step)
        gradients = {0: given[0].to(dtype), 1: given[1].to(dtype), 2: torch.cat(given[2:]).to(dtype)}
        sums = updater.update(units, gradients, 0.5)
        message = updater.statistic_sums(units, sums)
    return [p.detach() for p in parameters], updater.statistics(units, units, message[None])


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_updater_steps_alike_with_and_without_the_kernel(monkeypatch, dtype):
    taken = []
    monkeypatch.setattr(shard_update, "runs_in_triton", lambda t: False)
    weights, statistics = run_updater(dtype)
    monkeypatch.setattr(shard_update, "runs_in_triton", lambda t: taken.append(t) or True)
    found, measured = run_updater(dtype)
    assert taken
    torch.testing.assert_close(found, weights)
    assert measured == pytest.approx(statistics, rel=1e-4)


@kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_read_and_rounded_weights_written(dtype):
    """As with float32 copies of the gradients, and the rounding afterwards."""
    from slimfit_ds.optim.triton_adam import adam_step

    gradients = [t.to(dtype) for t in tensors(1)]
    results = []
    for given, rounded in (
        ([g.float() for g in gradients], None),
        (gradients, [torch.empty_like(g) for g in gradients]),
    ):
        weights = tensors(0)
        states = {name: [torch.zeros_like(w) for w in weights] for name in ("exp_avg", "exp_avg_sq")}
        adam_step(given, weights, states, [1, 2, 3, 4], OPTIONS, decoupled=True, rounded=rounded)
        results.append((weights, states))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(rounded, [w.to(dtype) for w in weights], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
def test_in_the_interpreter():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            Path(__file__).name,
            "-k",
            "not interpreter",
        ],
        cwd=Path(__file__).parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
