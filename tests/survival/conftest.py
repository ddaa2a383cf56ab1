"""A folder with a recipe, launches of it with faults, and the run that nothing happens to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RECIPE = {
    "task": "image_classification",
    "model": {
        "config": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "hidden_dropout_prob": 0.1,
        }
    },
    "data": "embedded:digits",
    "max_train_examples": 40,
    "max_eval_examples": 9,
    "max_steps": 6,
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "logging_steps": 1,
    "save_total_limit": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-3,
    "report_to": "none",
    "disable_tqdm": True,
    "ddp_timeout": 60,
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "slimfit": {"freeze": {"policy": "ils", "rate": 0.8}},
}


@dataclass(frozen=True)
class Runs:
    """Launches `launch/train.py --config recipe.yaml ...` in a folder.

    Args:
        folder: holds the recipe and the outputs.
        server: forks the ranks.
    """

    folder: Path
    server: Any

    def launch(self, *arguments: str, fault: dict | None = None, ranks: int = 2) -> Launched:
        events = self.folder / "events"
        for rank in range(ranks):
            events.with_suffix(f".{rank}").unlink(missing_ok=True)
        done = self.server.launch(
            Path(__file__).with_name("faulty_train.py"),
            *(json.dumps(fault), str(events), "--config", "recipe.yaml", *arguments),
            cwd=self.folder,
            ranks=ranks,
            timeout=90,
            grace=60,
        )
        files = [events.with_suffix(f".{rank}") for rank in range(ranks)]
        return Launched(
            **vars(done), events=[json.loads(file.read_text()) if file.exists() else [] for file in files]
        )


@dataclass(frozen=True)
class Launched:
    """A `Launch` of tests/conftest.py, and the kinds of events by rank, of ranks that ran to the end."""

    codes: list[int]
    ended: list[float]
    hung: bool
    logs: list[str]
    events: list[list[str]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, rank_server: Any) -> Runs:
    folder = tmp_path_factory.mktemp("survival")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    return Runs(folder, rank_server)


@pytest.fixture(scope="session")
def whole(runs: Runs) -> Path:
    """The output folder of the run that nothing happens to."""
    done = runs.launch("output_dir=whole")
    assert done.codes == [0, 0], done.logs
    return runs.folder / "whole"
