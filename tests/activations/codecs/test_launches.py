"""How many kernels a block launches, counted by the benchmark's own code; run as `test_triton_kernels.py` is."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from triton_cases import INTERPRETED

from slimfit_ds.activations.config import ActivationsConfig

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="launches are counted in Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:.*(invalid value|overflow|divide by zero):RuntimeWarning"),
]
# Triton's launches of a block, forward and backward.
#   BERT: two norms, queries with keys and values, GELU, two dropouts. Llama: the same without, and `up` of gate * up.
EXPECTED = {"bert": (6, 6), "llama": (5, 6)}


@pytest.fixture(scope="module")
def benchmark():
    path = Path(__file__).parents[3] / "benchmarks" / "activations" / "launches.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_launches", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", EXPECTED)
def test_balanced_packs_in_few_launches(benchmark, model):
    plain = benchmark.per_block(model, ActivationsConfig())
    forward, backward = benchmark.per_block(model, ActivationsConfig(preset="balanced"))
    assert (plain[0].triton, plain[1].triton) == (0, 0)
    assert (forward.triton, backward.triton) == EXPECTED[model]
    # No operation of PyTorch is added to the forward pass; the activation function's own is gone.
    assert forward.torch <= plain[0].torch
