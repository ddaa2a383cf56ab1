"""Launches of a tiny run on two forked ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent

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
        }
    },
    "data": "embedded:digits",
    "max_train_examples": 40,
    "max_eval_examples": 9,
    "max_steps": 6,
    "save_steps": 2,
    "eval_steps": 3,
    "train_batch_size": 8,
    "lr": 3e-3,
    "rank_timeout": 2,
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "slimfit": {"freeze": {"policy": "ils", "rate": 0.8}},
}


@dataclass(frozen=True)
class Launch:
    """How a launch ended.

    Args:
        codes: exit codes by rank, negative for signals.
        ended: seconds by rank since the first rank ended.
        hung: whether the server had to kill it.
        logs: what each rank printed.
        events: kinds of events by rank, of ranks that ran to the end.
    """

    codes: list[int]
    ended: list[float]
    hung: bool
    logs: list[str]
    events: list[list[str]]


class Server:
    """Launches runs on forked ranks."""

    def __init__(self, folder: Path):
        environment = {
            key: value
            for key, value in os.environ.items()
            if key not in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}
            and not key.startswith(("SLURM_", "OMPI_", "MASTER_", "TORCHELASTIC_"))
        }
        environment |= {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        }
        self.folder = folder
        self._count = 0
        self._errors = (folder / "server.err").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py"), str(folder / "recipe.yaml")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError((folder / "server.err").read_text()[-4000:])

    def launch(
        self, *arguments: str, fault: dict | None = None, ranks: int = 2, timeout: float = 60
    ) -> Launch:
        """Run `train ARGUMENTS` in the server's folder."""
        self._count += 1
        log = self.folder / f"log{self._count}"
        request = {
            "arguments": list(arguments),
            "fault": fault,
            "ranks": ranks,
            "timeout": timeout,
            "cwd": str(self.folder),
            "log": str(log),
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply = json.loads(self._process.stdout.readline())
        logs = [Path(f"{log}.{rank}").read_text() for rank in range(ranks)]
        places = [Path(f"{log}.events.{rank}") for rank in range(ranks)]
        events = [json.loads(place.read_text()) if place.exists() else [] for place in places]
        return Launch(logs=logs, events=events, **reply)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        finally:
            self._process.kill()
            self._errors.close()
