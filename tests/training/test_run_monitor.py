"""A real run, and what it leaves: the same numbers in the history, TensorBoard, CSV, `run.json` and the page."""

import csv
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "max_steps=12",
    "eval_steps=6",
    "train_batch_size=8",
    "max_train_examples=64",
    "max_eval_examples=16",
    "save_model=false",
    "logging_steps=4",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(folder: Path, *overrides: str, launcher: Sequence[str] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "launch/train.py", "--config", "recipes/digits_vit.yaml", *TINY]
    # Other tests of this session may have made a process group of one.
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in launched}
    return subprocess.run(
        [*command, f"output_dir={folder}", *overrides],
        cwd=ROOT,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.mark.slow
def test_everything_tells_the_same_story(tmp_path):
    done = train(tmp_path / "run", "report_to=[tensorboard, csv]", "track_memory=3")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "run"
    lines = [json.loads(text) for text in (folder / "history.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    for line in lines:
        assert set(line["times"]) == {"data", "forward", "backward", "step", "schedule"}
        assert all(value > 0 for value in line["times"].values())
        assert sum(line["times"].values()) <= line["seconds"]
    assert [bool(line.get("memory")) for line in lines] == [step % 4 == 3 for step in range(12)]

    tracked = [line["step"] for line in lines if "memory_at_peak" in line]
    assert tracked == [2]
    peak = lines[2]["memory_at_peak"]
    weights = facts_of(folder)["parameters"] * 4
    # float32 weights, and buffers beside them.
    assert weights <= peak["parameters"] <= 1.1 * weights
    assert peak["saved_activations_static"] > 0

    facts = facts_of(folder)
    assert (facts["status"], facts["steps"], facts["error"]) == ("finished", 12, None)
    sizes = facts["layers"]
    assert len(sizes) == 37
    always = facts["parameters"] - sum(sizes.values())
    for line in lines:
        active = sum(sizes[name] for name in line["active_layers"])
        assert line["frozen_parameters"] == pytest.approx(1 - (active + always) / facts["parameters"])

    with (folder / "csv" / "train_loss.csv").open() as file:
        logged = [(int(step), float(value)) for step, value in list(csv.reader(file))[1:]]
    expected = [
        (end, pytest.approx(statistics.fmean(line["loss"] for line in lines[end - 4 : end])))
        for end in (4, 8, 12)
    ]
    assert logged == expected


@pytest.mark.slow
@pytest.mark.distributed
def test_only_the_first_of_two_ranks_writes(tmp_path):
    """Two writers would leave two event files and each CSV row twice."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port", str(free_port())]
    done = train(tmp_path / "run", "report_to=[tensorboard, csv]", launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    rows = (tmp_path / "run" / "csv" / "train_loss.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "4", "8", "12"]
    assert facts_of(tmp_path / "run")["world_size"] == 2


@pytest.mark.slow
def test_a_missing_package_is_said_before_anything_is_written(tmp_path):
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed here")
    done = train(tmp_path / "run", "report_to=wandb")
    assert done.returncode == 2
    assert (
        "report_to 'wandb' needs the package wandb, which is not installed: pip install wandb" in done.stderr
    )
    assert not (tmp_path / "run").exists()
