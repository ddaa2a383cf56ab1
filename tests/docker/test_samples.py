"""Images, compose file and cluster samples in `docker/`: well formed, and what they name exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slimfit_ds.cli import COMMANDS

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
SAMPLES = ["compose.yaml", "mpijob.yaml", "pytorchjob.yaml", "slurm.sbatch"]


def program(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip(f"no {name}: pip install -c constraints.txt -e '.[dev]'")
    return found


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images(name):
    done = subprocess.run([program("hadolint"), DOCKER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (DOCKER / name).read_text()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            assert source in sent, f".dockerignore keeps {source} back"
    extras = re.search(r"requirements\.py (.*?) >", text)[1].split()
    listed = subprocess.check_output(
        [sys.executable, DOCKER / "requirements.py", *extras], cwd=ROOT, text=True
    )
    assert "deepspeed" in listed
    assert "pytest" not in listed


@pytest.mark.parametrize("name", SAMPLES)
def test_commands_and_recipes_of_the_samples_exist(name):
    text = (DOCKER / name).read_text()
    if name.endswith(".yaml"):
        yaml.safe_load(text)
    # `slimfit-ds train` runs from a clone only; an image has the script beside the recipes.
    (script,) = set(re.findall(r"\S*launch/\w+\.py", text))
    assert script == ("launch/train.py" if name == "slurm.sbatch" else "/opt/slimfit/launch/train.py")
    assert set(re.findall(r"slimfit-ds (\w+)", re.sub(r"#.*", "", text))) <= COMMANDS.keys()
    for recipe in re.findall(r"recipes/(\w+)\.yaml", text):
        assert (ROOT / "recipes" / f"{recipe}.yaml").is_file(), recipe
    for file in re.findall(r"dockerfile: (\S+)", text):
        assert (ROOT / file).is_file(), file


def test_the_slurm_script_is_sound():
    subprocess.run(["bash", "-n", DOCKER / "slurm.sbatch"], check=True)
    done = subprocess.run([program("shellcheck"), DOCKER / "slurm.sbatch"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def slurm(tmp_path):
    """Run the script with an `srun` and an `scontrol` that write down how they were called."""

    def run(train: str) -> tuple[int, list[str]]:
        called = tmp_path / "called"
        scripts = {
            "srun": f'echo "srun $*" >> {called}; case "$*" in *train.py*) {train};; esac',
            "scontrol": f'echo "scontrol $*" >> {called}',
        }
        for name, body in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "slimfit"}
        environment["OUTPUT_DIR"] = str(tmp_path / "out")
        done = subprocess.run(
            ["bash", DOCKER / "slurm.sbatch", "recipes/digits_vit.yaml"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, called.read_text().splitlines()

    return run


def test_a_finished_run_ends_the_job(slurm, tmp_path):
    code, called = slurm(f"mkdir -p {tmp_path}/out; touch {tmp_path}/out/metrics.json")
    assert code == 0
    assert not any("requeue" in line for line in called)


def test_sigterm_for_the_script_waits_for_the_run_and_requeues_it(slurm, tmp_path):
    """As at pre-emption: the script gets the signal while srun still saves."""
    code, called = slurm(f"kill -TERM $PPID; sleep 0.5; touch {tmp_path}/saved")
    assert (code, called[-1]) == (0, "scontrol requeue 42")
    assert (tmp_path / "saved").exists()


def test_a_failed_run_fails_the_job(slurm):
    code, called = slurm("exit 3")
    assert code == 3
    assert not any("requeue" in line for line in called)
