"""Compressed activations where DeepSpeed partitions the parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["minimal", "ultra"])
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
