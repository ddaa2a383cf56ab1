"""Every program says how it is used; the cheap ones run their smallest setting and leave rows that a second run keeps."""

from __future__ import annotations

import importlib
import sys

import pytest

PROGRAMS = [
    "peers",
    "largest_batch",
    "headline_memory",
    "long_sequences",
    "estimate_vs_measured",
    "engine_vs_stock",
    "ddp_freezing",
    "deepspeed_tests",
    "scaling",
    "step_time_vs_full",
    "tables",
    "bytes",
    "codec_error",
    "codec_speed",
    "gradient_error",
    "held_out_loss",
    "proof_cost",
    "step_time",
    "study",
    "summary",
]
# Program, arguments, columns that tell its rows apart, number of rows.
SMALL = [
    ("codec_error", "--numel 1280", ("codec", "rounding", "data"), None),
    ("codec_speed", "--device cpu --tokens 8 --hidden 64 --repeats 1", ("codec", "dtype", "device"), None),
    ("bytes", "--models DistilBERT --presets minimal", ("model", "preset"), 1),
    (
        "proof_cost",
        "--models bert --presets minimal --hidden 32 --layers 1 --rows 2 --tokens 8 --steps 1",
        ("model", "preset"),
        1,
    ),
    ("step_time", "--models llama --rows 1 --tokens 8 --steps 1", ("model", "method"), 7),
    (
        "step_time_vs_full",
        "--run mine --methods full balanced --layers 1 --rows 1 --tokens 8 --rounds 1 --warm-up 1",
        ("run", "method"),
        2,
    ),
    (
        "peers",
        "--device cpu --threads 1 --models tiny --methods minimal --rounds 1",
        ("model", "method"),
        1,
    ),
    pytest.param(
        "estimate_vs_measured", "--models tiny --strategies minimal", ("model",), 1, marks=pytest.mark.slow
    ),
    pytest.param(
        "engine_vs_stock",
        "--tiny --stages 1 --steps 1 --warm-up 1",
        ("stage", "engine"),
        3,
        marks=[pytest.mark.slow, pytest.mark.distributed],
    ),
]

pytestmark = pytest.mark.usefixtures("no_ranks")


def run(monkeypatch, program: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    importlib.import_module(program).main()


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, program, "--help")
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(("program", "arguments", "keys", "count"), SMALL)
def test_smallest_setting(program, arguments, keys, count, monkeypatch, tmp_path, capsys):
    from common import Study

    study = Study(tmp_path / "rows.csv", keys)
    options = [*arguments.split(), "--csv", str(study.path)]
    run(monkeypatch, program, *options)
    rows = study.rows()
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows)
    assert len(rows) == count if count else len(rows) > 10
    assert all(row["commit"] and row["torch"] and row["hardware"] and row["command"] for row in rows)
    assert all(row.get("status", "ok") == "ok" for row in rows)
    if program in ("step_time", "bytes"):
        written = study.path.read_text()
        run(monkeypatch, program, *options)
        assert study.path.read_text() == written


def test_a_run_of_the_fidelity_study_learns_and_repeats():
    from types import SimpleNamespace

    import numpy as np
    import torch
    from study import train

    class Classifier(torch.nn.Sequential):
        def forward(self, x, labels):
            logits = super().forward(x)
            return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels), logits=logits)

    inputs = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
    labels = (inputs[:, 0] > 0).long()
    separable = SimpleNamespace(
        metric="accuracy",
        autocast=False,
        batch_size=16,
        lengths=lambda: np.ones(200, dtype=int),
        batch=lambda indices, chance: {"x": inputs[indices], "labels": labels[indices]},
        evaluation=lambda size: [{"x": inputs[200:], "labels": labels[200:]}],
        model=lambda: Classifier(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)),
    )
    block = {"freeze": {"policy": "ils", "rate": 0.5}}
    first, second = (train(separable, 3e-2, 0, 60, slimfit=block) for _ in range(2))
    assert first["value"] > 0.9
    assert first | {"cpu_seconds": 0} == second | {"cpu_seconds": 0}
