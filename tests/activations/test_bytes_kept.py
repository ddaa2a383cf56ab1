"""Bytes kept per token and block at BERT-base and ViT-base shape, counted by the benchmark's own code."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

BOUNDS = {"balanced": 6.2, "lean": 2.2, "minimal": 1.1, "ultra": 0.65}


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "activations" / "bytes.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_bytes", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", ["BERT-base", "ViT-B/16-224"])
@pytest.mark.parametrize("preset", BOUNDS)
def test_bytes_per_token_and_block(benchmark, model, preset):
    assert benchmark.per_block(benchmark.SHAPES[model], preset, rate=0.95, seed=0) <= BOUNDS[preset]


def test_balanced_at_llama_shape(benchmark):
    assert benchmark.per_block(benchmark.SHAPES["Llama-3-8B"], "balanced", rate=0.95, seed=0) <= 7


def test_the_count_itself(benchmark):
    """A checkpoint with the input as it is keeps 2 h in bf16 for each block, and the mask once."""
    shape = benchmark.SHAPES["BERT-base"]
    config = benchmark.ActivationsConfig(operations={"block": "recompute"})
    original = benchmark.ActivationsConfig
    benchmark.ActivationsConfig = lambda preset: config
    try:
        found = benchmark.per_block(shape, "exact", rate=0.95, seed=0)
    finally:
        benchmark.ActivationsConfig = original
    mask = shape.batch * shape.tokens**2 / (shape.blocks * shape.batch * shape.tokens * shape.hidden)
    assert found == pytest.approx(2 + mask, abs=1e-6)
