"""The compare command: wrong input, and a real comparison with a strategy that fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from slimfit_ds.comparison.cli import main
from slimfit_ds.comparison.runner import Comparison, compare
from slimfit_ds.planner.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "digits_vit.yaml")


def test_all_problems_at_once(capsys, tmp_path):
    (tmp_path / "full.txt").write_text("x")
    arguments = ["--config", RECIPE, "--strategies", "minimall,full", "--ranks", "0", "--steps", "0"]
    arguments += ["--gpu-memory", "24XB", "--output", str(tmp_path), "no_such_key=1"]
    assert main(arguments) == 2
    text = capsys.readouterr().err
    for word in ("minimall", "did you mean 'minimal'", "ranks", "steps", "24XB", "not empty", "no_such_key"):
        assert word in text, word


def test_missing_recipe(capsys):
    assert main(["--config", "no/such.yaml"]) == 2
    assert "no/such.yaml" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_two_ranks_of_two_strategies_and_one_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    minimal = STRATEGIES["minimal_ils"]
    strategies = [
        STRATEGIES["full"],
        minimal.with_(name="broken", slimfit={"freeze": {"rate": 7.0}}),
        minimal,
    ]
    what = Comparison(
        RECIPE,
        strategies,
        tmp_path / "out",
        overrides=("max_steps=4", "per_device_train_batch_size=32"),
        warmup=1,
        tracked=1,
        gpu_memory=(("1MB", 10**6),),
    )
    full, broken, minimal = compare(what)
    assert broken.status == "failed"
    assert "rate must be in [0, 1)" in broken.error
    assert full.ok, full.error
    assert minimal.ok, minimal.error
    assert full.surroundings["engine"] == "DeepSpeedEngine"
    assert minimal.surroundings["engine"] == "SlimFitEngine"
    # patches 320, class token and positions 1152, 4 blocks of 33,472, last norm 128, head 650
    assert full.parameters == minimal.parameters == 320 + 1152 + 4 * 33_472 + 128 + 650
    # fp32, ZeRO 1 on two ranks: weights and gradients whole, two moments divided.
    assert full.states == pytest.approx((4 + 4 + 8 / 2) * full.parameters, rel=0.25)
    assert minimal.states < 0.6 * full.states
    assert minimal.states_host > 0
    assert minimal.saved < 0.3 * full.saved
    assert minimal.peak < full.peak
    # Full fine-tuning reduces and gathers every weight: 8 bytes for each.
    assert full.bytes_per_step == pytest.approx(8 * full.parameters, rel=0.05)
    assert minimal.bytes_per_step < 0.4 * full.bytes_per_step
    assert full.gpus["1MB"] > 2  # two ranks with megabytes each were measured
    assert full.steps == 4
    run = tmp_path / "out" / "full" / "run"
    measures = json.loads((run / "measures.json").read_text())
    assert (measures["steps"], measures["timed_steps"]) == (4, 2)
    assert len(measures["peaks"]) == 2
    assert (run / "memory_of_one_step.png").is_file()
    assert len(os.listdir(tmp_path / "out")) == 3
