"""Every kernel variant that steps of BERT and Llama launch with `balanced` and `minimal` compiles for sm_80 and sm_90, unspilt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="kernels are not compiled ahead: triton is not installed")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def compile_kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import compile_kernels

    return compile_kernels


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_presets_launch_compiles_for_a_gpu() -> None:
    """What is compiled stays in .cache, so that only new variants take time."""
    chosen = ["--jobs", "2", "--models", "bert", "llama", "--presets", "balanced", "minimal"]
    done = subprocess.run(
        [sys.executable, "benchmarks/compile_kernels.py", *chosen],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(ROOT / ".cache" / "triton")},
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = re.search(r"(\d+) variants of (\d+) kernels for 2 targets, 0 at fault", done.stdout)
    assert found, done.stdout[-500:]
    assert int(found[1]) >= 70
    assert int(found[2]) >= 12


def test_faults_are_found(compile_kernels) -> None:
    row = {"registers": 64, "stack": 0}
    assert compile_kernels.fault(row) is None
    assert compile_kernels.fault({**row, "stack": 8}) == "spills 8 bytes a thread"
    assert compile_kernels.fault({**row, "registers": 255}) == "255 registers, at most 200"
    assert compile_kernels.fault({**row, "error": "no"}) == "no"


def test_the_bound_is_that_of_a_copy(compile_kernels) -> None:
    """128 MiB read and written: 56 us at 4.8 TB/s; one instruction for 4 elements of a thread is far less."""
    row = {
        "kernel": "copy",
        "programs": 1 << 16,
        "elements": 1 << 26,
        "bytes": 1 << 28,
        "warps": 4,
        "instructions": 10,
        "operations": {"LDG.E.128": 2, "IADD3": 8},
    }
    assert compile_kernels.bound(row) == {"per_element": 1.2, "bytes_per_element": 4.0, "share": 1.0}
    # 16 times as many: 16 * 16 half-rate cycles of 4 warps of 65,536 programs on 528 schedulers.
    slow = {**row, "operations": {"IADD3": 128}, "instructions": 160}
    assert compile_kernels.bound(slow)["share"] == round(
        (2**28 / 4.8e12) / (256 * 4 * 65536 / (528 * 1.755e9)), 2
    )
