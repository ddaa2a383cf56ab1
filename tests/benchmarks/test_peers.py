"""The comparison with peers: its arithmetic, its budget, and the whole program on a model of a few kilobytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]


@given(limit=st.integers(0, 3000), known=st.integers(0, 50), highest=st.integers(1, 2048))
def test_largest_batch_is_within_a_sixteenth(limit, known, highest):
    from peers_methods.batch_fit import largest_within

    known = min(known, limit, highest)
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= limit

    found = largest_within(fits, known, highest)
    true = min(limit, highest)
    assert found <= true
    assert found == true or true - found <= max(1, found // 16)
    assert len(tried) <= 24


def piecewise(batch):
    """The largest of three lines, in bytes: states of the update, then two places of the forward pass."""
    lines = [("step", 12 * 10**9, 0), ("forward", 6 * 10**9, 30_000_000), ("backward", 3 * 10**9, 45_000_000)]
    phase, fixed, slope = max(lines, key=lambda line: line[1] + line[2] * batch)
    return phase, fixed + slope * batch


@pytest.mark.parametrize("batch", [1, 8, 128, 500, 1000])
@pytest.mark.parametrize("size", [11, 13, 18, 24, 32, 200])
def test_estimated_batches_follow_the_line_that_the_peak_ends_on(batch, size):
    from peers_methods.batch_fit import RESERVE, Peak, estimated_batches
    from peers_methods.workloads import CASES

    simulated = []

    def peak(samples):
        simulated.append(samples)
        phase, held = piecewise(samples)
        return Peak(held, phase)

    room = size * 10**9 - RESERVE
    found = estimated_batches(CASES["tiny"].with_batch(batch), peak, {"card": size * 10**9})
    largest = found["largest"]["card"]
    true = max((n for n in range(1, 5000) if piecewise(n)[1] <= room), default=0)
    # A chord lies above what it spans: never too many samples, and few too few.
    assert largest <= true
    assert largest >= 0.6 * true
    last, before = max(simulated), sorted(simulated)[-2] if len(simulated) > 1 else 0
    if piecewise(last)[0] == piecewise(before)[0] == "backward":
        assert abs(largest - true) <= 1 or largest < last
    assert len(simulated) == len(set(simulated)) <= 8
    assert next(iter(found["peaks"])) == batch


def test_estimated_batches_know_what_cannot_be_told():
    from peers_methods.batch_fit import CannotSimulate, Peak, estimated_batches
    from peers_methods.workloads import CASES

    def refuse(samples):
        raise CannotSimulate("no fake step")

    assert estimated_batches(CASES["tiny"], refuse) == {"error": "no fake step"}
    fits = estimated_batches(CASES["tiny"], lambda samples: Peak(25 * 10**9, "forward"), micro_batch=2)
    assert fits["largest"] == {"24 GB": 0, "32 GB": "any"}
    assert fits["micro_batch"] == 2


def test_methods_on_fake_tensors_hold_what_they_hold_on_real_ones():
    """In a process of its own: a pretended world is for life."""
    code = """
import gc, torch
from peers_methods.building import Request
from peers_methods.methods import METHODS
from peers_methods.simulated import simulate
from peers_methods.workloads import CASES, make_batches
from slimfit_ds.memory.tracker import MemoryTracker

case, device = CASES["tiny"], torch.device("cpu")
for name in ("galore", "torchao_8bit", "lisa"):
    method = METHODS[name]
    try:
        trainer = method.build(Request(case, 4, device))
    except Exception as error:
        print(name, "unavailable", error)
        continue
    batch = make_batches(case, 4, device, count=1)[0]
    with torch.compiler.set_stance("force_eager"):
        trainer.step(batch)
        gc.collect()
        tracker = MemoryTracker(trainer.model, trainer.roots())
        with tracker:
            trainer.step(batch, tracker.phase)
    real = tracker.report(without_phases=trainer.uncounted_phases)
    fake = simulate("tiny", name, 4, target="cpu")
    inputs = sum(t.nbytes for t in batch.values())
    assert 0 <= real.peak - fake["bytes"] <= inputs + 64, (name, fake, real.peak)
    print(name, "agrees", real.peak)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = f"{ROOT / 'benchmarks'}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lisa agrees" in done.stdout


def test_ours_is_the_policy_that_its_label_says():
    from peers_methods.methods import METHODS
    from peers_methods.workloads import CASES

    from slimfit_ds.config import SlimFitConfig

    for name, policy, preset in (
        ("minimal", "ils", "minimal"),
        ("auto_minimal", "columns", "minimal"),
        ("auto_balanced", "columns", "balanced"),
        ("auto_tuned", "columns", "minimal"),
    ):
        config = SlimFitConfig.parse(METHODS[name].strategy(CASES["tiny"]).slimfit)
        assert (config.freeze.policy, config.freeze.rate) == (policy, 0.95)
        assert config.activations.preset == preset
        assert config.optimizer_states.inactive == "host"


def test_every_method_has_a_simulation_or_is_a_repetition():
    from peers_methods.methods import METHODS

    assert [name for name, method in METHODS.items() if not method.simulated] == ["full_again"]


def test_flops_are_those_of_torch():
    from peers_methods.flops import FlopCounter

    model = torch.nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    x = torch.randn(2, 8, 32)
    with FlopCounterMode(display=False) as theirs:
        model(x).sum().backward()
    with FlopCounter() as ours:
        model(x).sum().backward()
    query = torch.randn(1, 2, 8, 16, requires_grad=True)
    with FlopCounter() as attention:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    assert ours.flops >= theirs.get_total_flops() > 0
    # Forward: two products of 2 x 8 x 8 x 16, backward: five of them.
    assert attention.flops == 7 * 2 * (2 * 8 * 8 * 16)


def test_cells_come_in_the_order_of_their_priority():
    from peers_methods.methods import METHODS
    from peers_methods.running import plan_cells
    from peers_methods.workloads import cases_for

    cases = cases_for("cuda")
    cells = plan_cells(cases, list(METHODS), fit=True)
    assert len(cells) == len(set(cells)) == len(cases) * (2 * len(METHODS) - 1)
    core = {"full", "checkpointing", "balanced", "minimal"}
    assert {(cell.case, cell.method) for cell in cells[:12]} == {(c, m) for c in cases[:3] for m in core}
    assert all(cell.kind == "step" for cell in cells[:12])
    # The presets of the first cases come before anything of the last.
    assert cells.index(next(c for c in cells if c.method == "ultra")) < cells.index(
        next(c for c in cells if c.case == cases[-1])
    )
    # Drift is told by what runs last of its kind.
    own = [cell for cell in cells if cell.case == cases[0] and cell.kind == "step"]
    assert own[-1].method == "full_again"


def test_every_method_trains_the_same_batches():
    from peers_methods.workloads import CASES, make_batches

    for name in ("tiny", "vit-small", "gpt2-small"):
        first, again = (make_batches(CASES[name], 2, torch.device("cpu"), seed=3) for _ in range(2))
        assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)


def run(arguments, output, timeout=240, **environment):
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "--device", "cpu", "--models", "tiny"]
    command += [
        "--threads",
        "1",
        "--steps",
        "1",
        "--rounds",
        "3",
        "--warm-up",
        "1",
        "--no-fit",
        "--output",
        str(output),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
    )


@pytest.mark.slow
def test_a_run_makes_a_table_and_is_resumed(tmp_path):
    done = run(["--methods", "full,torchao_offload,minimal"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    full, offload, minimal = (
        json.loads((tmp_path / "cells" / f"tiny__{name}__step.json").read_text())
        for name in ("full", "torchao_offload", "minimal")
    )
    assert (full["status"], offload["status"], minimal["status"]) == ("ok", "unavailable", "ok")
    assert full["finite"]
    assert minimal["finite"]
    # fp32 weights and gradients and two moments, against bf16 weights with the rest on the host.
    assert full["state_bytes"] >= 16 * full["parameters"]
    assert minimal["state_bytes"] < 6 * minimal["parameters"]
    assert minimal["host_bytes"] > 0
    table = (tmp_path / "table.md").read_text()
    assert "CUDA and XPU only" in table
    assert "`minimal`" in table
    again = run(["--methods", "full,torchao_offload,minimal"], tmp_path)
    assert "3 cells are there already" in again.stdout


@pytest.mark.slow
def test_a_spent_budget_drops_cells_and_says_so(tmp_path):
    done = run(["--methods", "full,minimal", "--budget-minutes", "0.001"], tmp_path)
    assert done.returncode == 1
    assert "2 cells dropped" in done.stdout
    assert (
        "Dropped, because the time budget was spent: tiny__full__step" in (tmp_path / "table.md").read_text()
    )


def test_unknown_names_are_told_with_the_known_ones(tmp_path):
    done = run(["--methods", "full,mnimal"], tmp_path)
    assert done.returncode != 0
    assert "mnimal unknown; known: full" in done.stderr


@pytest.mark.slow
def test_the_gpu_suite_runs_dry_on_a_cpu(tmp_path):
    environment = {
        **os.environ,
        "OUT": str(tmp_path),
        "DEVICE": "cpu",
        "MODELS": "tiny",
        "METHODS": "full",
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "TESTS": "tests/memory/test_storages.py",
        "CODEC_TOKENS": "8",
        "BUDGET_MINUTES": "3",
    }
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh")],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment,
        cwd=ROOT,
    )
    assert (tmp_path / "results.tar.gz").is_file(), done.stdout + done.stderr
    assert "peers: exit code 0" in done.stdout, done.stdout
    assert "codec_speed: exit code 0" in done.stdout, done.stdout
    assert "kernel_speed: exit code 0" in done.stdout, done.stdout
    assert "BERT 2 x h64" in (tmp_path / "peers.md").read_text()


def test_measured_batches_stay_under_each_cap(monkeypatch):
    """A card and a method that are only pretended: what is asked of them, and what comes of running out of memory."""
    from peers_methods import batch_fit
    from peers_methods.methods import Method
    from peers_methods.workloads import CASES

    total, cap, recovered = 80 * 10**9, {}, []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=total)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: cap.update(bytes=share * total)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    class Pretended:
        def __init__(self):
            self.facts = {}

        def step(self, batch):
            if 10**10 + 10**9 * len(batch["input_ids"]) > cap["bytes"]:
                raise torch.OutOfMemoryError("pretended")

        def recover(self):
            recovered.append(True)

    method = Method("pretended", "pretended", lambda request: Pretended(), 0)
    found = batch_fit.measured_batches(method, CASES["tiny"], torch.device("cpu"))
    assert found["largest"] == {"24 GB": 13, "32 GB": 21}
    assert recovered
