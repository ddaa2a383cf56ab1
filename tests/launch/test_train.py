"""`launch/train.py` as a user starts it: the same steps whatever the launcher, the number of ranks and the loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoImageProcessor, AutoModelForImageClassification

from slimfit_ds.integrations.ranks import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "launch" / "train.py")
BIN = Path(sys.executable).parent

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

RECIPE = {
    "task": "image_classification",
    "model": {
        "config": {
            "model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        }
    },
    "data": "embedded:digits",
    "max_train_examples": 96,  # whole batches: the last one of an epoch is filled up for several ranks
    "max_eval_examples": 32,
    "max_steps": 12,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "deepspeed": {"zero_optimization": {"stage": 1}},
    "slimfit": {"freeze": {"policy": "ils", "rate": 0.8}},
}  # fmt: skip


def environment() -> dict[str, str]:
    """Without what an earlier test or launcher left."""
    left = ("SLURM_", "OMPI_", "PMI", "PRTE_", "MASTER_", "ACCELERATE_")
    keep = {key: value for key, value in os.environ.items() if not key.startswith(left)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        keep.pop(name, None)
    path = f"{BIN}{os.pathsep}{keep.get('PATH', '')}"
    return keep | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": path}


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))

    def run(name: str, *prefix: str, overrides: tuple[str, ...] = ()):
        command = [*prefix, SCRIPT, "--config", "recipe.yaml", "--output_dir", name, *overrides]
        done = subprocess.run(
            command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
        )
        return done, folder / name

    return run


def read(folder: Path):
    lines = (folder / "history.jsonl").read_text().splitlines()
    return json.loads((folder / "metrics.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def alone(launch):
    """The reference: plain python, one rank, the DeepSpeed engine."""
    done, folder = launch("alone", sys.executable)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_two_ranks_train_as_one(launch, alone, launcher):
    """Under `deepspeed` by the engine; under `torchrun` by the Trainer's own loop, with accumulation."""
    port = str(free_port())
    if launcher == "deepspeed":
        prefix = (str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port)
        overrides = ("--per_device_train_batch_size", "8")
    else:
        prefix = (str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port)
        overrides = ("deepspeed=null", "per_device_train_batch_size=4", "gradient_accumulation_steps=2")
    done, folder = launch(launcher, *prefix, overrides=overrides)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (one, steps), (two, lines) = read(alone), read(folder)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["engine"] == ("SlimFitEngine" if launcher == "deepspeed" else "Trainer")
    assert len(steps) == len(lines) == 12
    for a, b in zip(steps, lines, strict=True):
        assert a["active_layers"] == b["active_layers"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
    assert two["metrics"]["accuracy"] == one["metrics"]["accuracy"]
    assert two["metrics"]["loss"] == pytest.approx(one["metrics"]["loss"], rel=1e-3)


def test_what_is_exported_loads_without_this_package(alone):
    model = AutoModelForImageClassification.from_pretrained(alone / "model")
    processor = AutoImageProcessor.from_pretrained(alone / "model")
    assert model.config.num_labels == 10
    assert (processor.size["height"], list(processor.image_mean)) == (8, [0.5])


def test_all_problems_of_a_recipe_end_in_one_message(launch):
    torchrun = (str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()))
    overrides = ("lr=1e-4", "max_steps=many", "data=embedded:letters", "--slimfit.freeze.rate", "7")
    done, folder = launch("bad", *torchrun, overrides=overrides)
    assert done.returncode != 0
    for part in (
        "lr is now learning_rate",
        "max_steps must be a valid integer, got 'many'",
        "no embedded data set 'letters'",
        "slimfit.freeze.rate must be in [0, 1), got 7",
    ):
        assert done.stderr.count(part) == 1, done.stderr
    assert not folder.exists()
