"""`slimfit-ds doctor` as a program: alone, under a launcher, and over two hosts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))
import two_hosts

from slimfit_ds.doctor import cli
from slimfit_ds.doctor.findings import Subject, ok, problem
from slimfit_ds.training.rendezvous import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "launch" / "doctor.py")
# Imports take their time on two shared cores; the default of 8 s is for machines that train.
PATIENT = ("--time-limit", "40")


def environment(folder: Path, **more: str) -> dict[str, str]:
    keep = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(
            ("SLURM_", "OMPI_", "PMI", "PRTE_", "MASTER_", "GLOO_", "LOCAL_", "TORCHELASTIC")
        )
        and key not in {"RANK", "WORLD_SIZE"}
    }
    keep["PATH"] = f"{BIN}{os.pathsep}{keep.get('PATH', '')}"
    keep |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return keep | {"TORCH_EXTENSIONS_DIR": str(folder / "extensions")} | more


def run(folder: Path, *command: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder, env=environment(folder, **more), capture_output=True, text=True, timeout=150,
    )  # fmt: skip


def found(text: str) -> dict[str, list[dict]]:
    """Findings of a JSON report by check."""
    by_check: dict[str, list[dict]] = {}
    for finding in json.loads(text)["findings"]:
        by_check.setdefault(finding["check"], []).append(finding)
    return by_check


# alone


def test_this_machine_is_ready_for_a_run(tmp_path):
    done = run(tmp_path, sys.executable, SCRIPT, "--json", *PATIENT)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = found(done.stdout)
    assert {"python", "packages", "devices", "communication", "mpi", "extension builds", "hub"} <= set(checks)
    assert checks["accelerator"][0]["message"] == "cpu, ranks talk through gloo"
    assert list(tmp_path.iterdir()) == []


def test_broken_things_are_named_and_the_exit_code_is_1(tmp_path):
    """A stale lock, an output folder that is none, an accelerator that is not there."""
    lock = tmp_path / "extensions" / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (tmp_path / "file").touch()
    done = run(
        tmp_path, BIN / "slimfit-ds", "doctor", "--output-dir", tmp_path / "file" / "out", *PATIENT,
        DS_ACCELERATOR="abacus",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert str(lock) in done.stdout
    assert "is no folder" in done.stdout
    assert "'abacus'" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("3 problems")
    assert "Traceback" not in done.stdout + done.stderr


@pytest.fixture
def quick(monkeypatch):
    """Only these checks, in this process."""

    def only(*checks):
        monkeypatch.setattr(cli, "CHECKS", checks)
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    return only


def test_exit_code_and_json_in_this_process(quick, capsys):
    quick(("a", lambda subject: [ok("a", "fine")]))
    assert cli.run(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == 0
    quick(("a", lambda subject: [problem("a", "bad", "do")]))
    assert cli.run([]) == 1
    assert "1 problem, no warnings" in capsys.readouterr().out


def test_options_reach_the_checks(quick, tmp_path):
    seen: list[Subject] = []
    quick(("a", lambda subject: seen.append(subject) or []))
    options = [
        "--output-dir",
        "/o",
        "--hostfile",
        "/h",
        "--ssh-port",
        "2222",
        "--time-limit",
        "3",
        "--local_rank=0",
    ]
    assert cli.run(options) == 0
    assert (seen[0].output_dir, seen[0].hostfile) == (Path("/o"), Path("/h"))
    assert (seen[0].ssh_port, seen[0].seconds) == (2222, 3.0)


@pytest.mark.parametrize("limit", ["0", "-1", "soon", "inf"])
def test_a_time_limit_that_is_none(limit, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(["--time-limit", limit])
    assert stop.value.code == 2


def test_a_hanging_check_does_not_keep_the_program(tmp_path):
    code = (
        "import sys, time; from slimfit_ds.doctor import cli; "
        "cli.CHECKS = (('driver', lambda subject: time.sleep(60)),); sys.exit(cli.main(['--time-limit', '0.5']))"
    )
    start = time.monotonic()
    done = run(tmp_path, sys.executable, "-c", code)
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    assert "no answer within 0.5 s" in done.stdout


# under a launcher


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_gives_one_report(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    done = run(tmp_path, sys.executable, *launcher, SCRIPT, *PATIENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("slimfit-ds doctor:") == 1
    assert "2 ranks (torchrun)" in done.stdout
    assert "gloo, 2 ranks, 1 MiB in" in done.stdout


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rank_that_never_starts_is_named(tmp_path):
    """Rank 0 of three waits as long as it may, and no longer."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
    start = time.monotonic()
    done = run(tmp_path, sys.executable, SCRIPT, "--time-limit", "4", MASTER_PORT=str(free_port()), **place)
    assert time.monotonic() - start < 60
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "ranks 1-2" in done.stdout or "rendezvous" in done.stdout, done.stdout


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[two_hosts.TwoHosts]:
    if reason := two_hosts.missing():
        pytest.skip(reason)
    with two_hosts.two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


def on_both(hosts, folder: Path, *options: str, second: dict[str, str] | None = None) -> list:
    """One rank on each host, as `srun` would start them; exit code, output and errors of each."""
    step = {
        "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "0",
        "SLURM_STEP_NODELIST": "host-[a-b]", "MASTER_ADDR": "host-a", "MASTER_PORT": "29600",
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [hosts.on, hosts.names[rank], sys.executable, SCRIPT, *options],
            cwd=folder,
            env=environment(folder, **step, SLURM_PROCID=str(rank)) | ((second or {}) if rank else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=150) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_hosts_with_other_versions(hosts, tmp_path):
    """The second host has another numpy, a stale lock and the interface of a third machine."""
    other = tmp_path / "site" / "numpy-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    lock = tmp_path / "extensions_b" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    second = {"PYTHONPATH": str(tmp_path / "site"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions_b")}
    (first, text, errors), (code, silent, _) = on_both(hosts, tmp_path, "--json", *PATIENT, second=second)
    assert (first, code) == (1, 1), text + errors
    assert silent == ""
    report = json.loads(text)
    assert (report["hosts"], report["ranks"], report["launcher"]) == (["host-a", "host-b"], 2, "srun")
    checks = found(text)
    assert [(each["hosts"], each["status"]) for each in checks["packages"]] == [
        ([hosts.names[0]], "ok"),
        ([hosts.names[1]], "problem"),
    ]
    assert "on host-a (rank 0); 1.0 on host-b (rank 1)" in checks["versions of ranks"][0]["message"]
    stale = [each for each in checks["extension builds"] if each["status"] == "problem"]
    assert [each["hosts"] for each in stale] == [["host-b"]]
    # Both hosts' own names are loopback addresses: gloo gets through because it is told the interface.
    assert checks["all-reduce"][0]["status"] == "ok", checks["all-reduce"]


@pytest.mark.distributed
@pytest.mark.slow
def test_two_hosts_that_do_not_reach_each_other(hosts, tmp_path):
    pull, plug = (["ip", "link", "set", two_hosts.CABLE, state] for state in ("down", "up"))
    subprocess.run([hosts.on, "host-b", *pull], check=True)
    start = time.monotonic()
    try:
        (first, text, _), (code, other, errors) = on_both(hosts, tmp_path, "--time-limit", "5")
    finally:
        subprocess.run([hosts.on, "host-b", *plug], check=True)
    assert time.monotonic() - start < 90
    assert (first, code) == (1, 1)
    assert "rank 1 on host-b does not reach rank 0 at host-a:29600" in " ".join(other.split()), other + errors
    assert "host-a" in text
