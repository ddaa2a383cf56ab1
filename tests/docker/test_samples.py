"""Images, compose file and cluster samples in `docker/`: well formed, and in step with the package."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from slimfit_ds.cli import COMMANDS
from slimfit_ds.doctor.cli import CHECKS
from slimfit_ds.training.recipe import read_recipe

sys.path.insert(0, str(Path(__file__).parents[2] / "docker"))
from replay import Step, read_steps

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = ["Dockerfile.cpu", "Dockerfile.cuda"]
JOBS = {"mpijob.yaml": "mpiReplicaSpecs", "pytorchjob.yaml": "pytorchReplicaSpecs"}
IMAGES = {"slimfit-ds:cpu": "Dockerfile.cpu", "slimfit-ds:cuda": "Dockerfile.cuda"}


def program(name: str) -> str:
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"no {name}: pip install -c constraints.txt -e '.[dev]'")
    return found


def steps(name: str) -> list[Step]:
    return list(read_steps((DOCKER / name).read_text()))


def values(name: str, keyword: str) -> list[str]:
    return [step.value for step in steps(name) if step.keyword == keyword]


def assert_trains(words: list[str]) -> None:
    """The words after `slimfit_ds.cli` are a command of this package, with a recipe of this checkout."""
    assert words[0] == "train"
    assert words[0] in COMMANDS
    assert words[1] == "--config"
    recipe = ROOT / words[2].removeprefix("/opt/slimfit/")
    draft = read_recipe(recipe, words[3:])
    assert not draft.problems


# images


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name):
    done = subprocess.run([program("hadolint"), DOCKER / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_pinned_and_run_as_nobody_special(name):
    defaults = dict(value.split("=", 1) for value in values(name, "ARG"))
    bases = {
        re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], value.split()[0])
        for value in values(name, "FROM")
    }
    assert all(re.search(r":\d+\.\d+\.\d+", base) for base in bases), bases
    assert "latest" not in str(bases)
    assert values(name, "USER") == ["10001"]
    assert [step.keyword for step in steps(name)].index("USER") > max(
        number for number, step in enumerate(steps(name)) if step.keyword in ("RUN", "COPY")
    )


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_changed_source_reinstalls_no_requirement(name):
    """Everything that downloads comes before the source is copied."""
    all_steps = [step for step in steps(name) if step.keyword in ("RUN", "COPY")]
    source = all_steps.index(Step("COPY", "slimfit_ds ./slimfit_ds"))
    downloads = [number for number, step in enumerate(all_steps) if "pip install" in step.value]
    assert downloads == [*[number for number in downloads if number < source], source + 1]
    assert all_steps[source + 1].value == "pip install --no-deps ."


@pytest.mark.parametrize("name", DOCKERFILES)
def test_no_cache_stays_in_an_image(name):
    assert all("rm -rf /var/lib/apt/lists/*" in value for value in values(name, "RUN") if "apt-get" in value)
    assert any("PIP_NO_CACHE_DIR=1" in value for value in values(name, "ENV"))
    assert len(values(name, "FROM")) == 2


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_starts(name):
    assert json.loads(values(name, "ENTRYPOINT")[0]) == ["slimfit-ds"]
    health = json.loads(values(name, "HEALTHCHECK")[0].partition("CMD")[2])
    assert health[:3] == ["slimfit-ds", "doctor", "--only"]
    assert set(health[3].split(",")) <= {check for check, _ in CHECKS}


@pytest.mark.parametrize("name", DOCKERFILES)
def test_everything_that_is_copied_is_there_and_not_ignored(name):
    """The ignore file lets through what the Dockerfiles copy, and neither data nor results."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]

    def sent(path: str) -> bool:
        verdict = True
        for rule in rules:
            pattern = rule.removeprefix("!")
            if any(fnmatch.fnmatch(part, pattern) for part in (path, path.split("/")[0])):
                verdict = rule.startswith("!")
        return verdict

    copied = [
        source for value in values(name, "COPY") if "--from" not in value for source in value.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert sent(source), source
    for private in (".git", ".venv", "outputs", "tests", ".cache", "shared"):
        assert not sent(private), private


@pytest.mark.parametrize("name", DOCKERFILES)
def test_extras_are_those_of_the_package(name):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    command = next(value for value in values(name, "RUN") if "requirements.py" in value)
    words = command.split("requirements.py")[1].split(">")[0].split()
    assert words
    assert set(words) <= set(extras)
    done = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert set(extras[words[0]]) <= set(lines)
    assert any(line.startswith("deepspeed") for line in lines)
    assert not any(line.startswith("pytest") for line in lines)


# compose


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_compose_builds_the_images(compose):
    for service in compose["services"].values():
        assert IMAGES[service["image"]] == Path(service["build"]["dockerfile"]).name
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert {volume.split(":")[0] for volume in service["volumes"]} == set(compose["volumes"])
    device = compose["services"]["train"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert device["capabilities"] == ["gpu"]
    assert compose["services"]["train-cpu"]["profiles"] == ["cpu"]


@pytest.mark.parametrize("name", ["train", "train-cpu"])
def test_compose_starts_a_run(compose, name, tmp_path):
    """The command as the container's shell sees it, with a torchrun that writes down its arguments."""
    fake = tmp_path / "torchrun"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    service = compose["services"][name]
    command = [word.replace("$$", "$") for word in (*service["entrypoint"], *service["command"])]
    variables = {"RECIPE": "digits_vit", "RANKS": "3", "OVERRIDES": "max_steps=7 lr=0.001"}
    assert set(variables) <= set(service["environment"])
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", **variables}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    assert said[: said.index("slimfit_ds.cli")] == ["--standalone", "--nproc_per_node", "3", "-m"]
    words = said[said.index("slimfit_ds.cli") + 1 :]
    assert words[-2:] == ["max_steps=7", "lr=0.001"]
    assert_trains(words)


# Kubernetes


@pytest.mark.parametrize(("name", "replicas"), JOBS.items())
def test_pods_start_ranks_without_ssh(name, replicas):
    job = yaml.safe_load((DOCKER / name).read_text())
    kinds = {
        "mpijob.yaml": ("kubeflow.org/v2beta1", "MPIJob"),
        "pytorchjob.yaml": ("kubeflow.org/v1", "PyTorchJob"),
    }
    assert (job["apiVersion"], job["kind"]) == kinds[name]
    for replica in job["spec"][replicas].values():
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] in IMAGES
        assert container["command"] == ["torchrun"]
        assert "ssh" not in " ".join(container["args"])
        words = container["args"]
        assert_trains(words[words.index("slimfit_ds.cli") + 1 :])
        assert pod["securityContext"]["runAsUser"] == 10001
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert gpus == int(job["spec"].get("nprocPerNode") or job["spec"]["slotsPerWorker"])


def test_numbers_of_the_mpijob_agree():
    spec = yaml.safe_load((DOCKER / "mpijob.yaml").read_text())["spec"]
    pods = sum(replica["replicas"] for replica in spec["mpiReplicaSpecs"].values())
    for replica in spec["mpiReplicaSpecs"].values():
        options = dict(
            word.removeprefix("--").split("=") for word in replica["template"]["spec"]["containers"][0]["args"] if word.startswith("--") and "=" in word
        )  # fmt: skip
        assert int(options["nnodes"]) == pods
        assert int(options["nproc_per_node"]) == spec["slotsPerWorker"]
        assert options["node_rank"] == "$(NODE_RANK)"
    assert spec["runLauncherAsWorker"] is True


def test_the_pytorchjob_is_what_the_operator_looks_for():
    spec = yaml.safe_load((DOCKER / "pytorchjob.yaml").read_text())["spec"]["pytorchReplicaSpecs"]
    assert set(spec) == {"Master", "Worker"}
    assert all(replica["template"]["spec"]["containers"][0]["name"] == "pytorch" for replica in spec.values())


# Slurm


def test_the_slurm_script_is_sound():
    script = DOCKER / "slurm.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run([program("shellcheck"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def slurm(tmp_path):
    """Runs the script with an `srun` and an `scontrol` that write down how they were called."""

    def run(train: str) -> tuple[int, list[str]]:
        called = tmp_path / "called"
        called.unlink(missing_ok=True)
        scripts = {
            "srun": f'echo "srun $*" >> {called}; case "$*" in *train*) {train};; esac',
            "scontrol": f'echo "scontrol $*" >> {called}',
        }
        for name, body in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "42", "SLURM_JOB_NAME": "slimfit"}
        environment["OUTPUT_DIR"] = str(tmp_path / "out")
        done = subprocess.run(
            ["bash", DOCKER / "slurm.sbatch", "recipes/digits_vit.yaml", "lr=0.01"],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return done.returncode, called.read_text().splitlines()

    return run


def test_a_finished_run_ends_the_job(slurm, tmp_path):
    code, called = slurm(f"mkdir -p {tmp_path}/out; touch {tmp_path}/out/metrics.json")
    assert code == 0
    doctor, train = (line.split() for line in called)
    assert doctor[doctor.index("slimfit-ds") + 1] == "doctor"
    words = train[train.index("slimfit-ds") + 1 :]
    assert words[-3:] == [f"output_dir={tmp_path}/out", "resume=auto", "lr=0.01"]
    assert_trains(words)


def test_a_stopped_run_goes_back_into_the_queue(slurm):
    code, called = slurm("true")
    assert (code, called[-1]) == (0, "scontrol requeue 42")


def test_sigterm_for_the_script_waits_for_the_run(slurm, tmp_path):
    """As at pre-emption: the script gets the signal while srun still saves."""
    code, called = slurm(f"kill -TERM $PPID; sleep 1; touch {tmp_path}/saved")
    assert (code, called[-1]) == (0, "scontrol requeue 42")
    assert (tmp_path / "saved").exists()


def test_a_failed_run_fails_the_job(slurm):
    code, called = slurm("exit 3")
    assert code == 3
    assert not any("requeue" in line for line in called)
