"""`slimfit-ds doctor`: leftover locks, small machines, and ranks that meet or do not."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

from slimfit_ds import doctor
from slimfit_ds.doctor import check_machine, main
from slimfit_ds.integrations.ranks import free_port


def lines(findings, status):
    return [str(finding) for finding in findings if finding.status == status]


def test_a_lock_that_no_process_holds_is_a_problem_and_one_that_is_held_is_not(tmp_path):
    place = tmp_path / "py311_cpu" / "adam"
    place.mkdir(parents=True)
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": os.environ["PATH"]}
    assert not lines(check_machine(environment), "problem")
    lock = place / "lock"
    with lock.open("w"):
        found = check_machine(environment)
        assert not lines(found, "problem")
        assert "is held by a build" in lines(found, "warning")[0]
    (problem,) = lines(check_machine(environment), "problem")
    assert f"rm {lock}" in problem


def test_missing_programs_and_little_shared_memory_are_warnings(tmp_path, monkeypatch):
    environment = {"PATH": str(tmp_path), "CXX": "no-such-compiler", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=64 * 2**20))
    warnings = "\n".join(lines(check_machine(environment, tmp_path), "warning"))
    assert "no-such-compiler is not on PATH" in warnings
    assert "0.06 GiB free" in warnings
    assert "--shm-size" in warnings


def test_alone_it_imports_no_torch(tmp_path):
    """A container's health check runs every few minutes."""
    code = "import sys; from slimfit_ds.doctor import main; main([]); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    for name in ("RANK", "WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no build lock in" in done.stdout


def start(rank: int, port: int, fake: str = "") -> subprocess.Popen:
    """Rank `rank` of two on this machine, with a line of code before the check."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    code = f"import sys; from slimfit_ds import doctor; {fake or 'pass'}; sys.exit(doctor.main(['--time-limit', '20']))"
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1, text=True)


def test_ranks_that_meet_with_different_versions():
    port = free_port()
    ranks = [start(0, port), start(1, port, "doctor.version = lambda name: '9.9'")]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], outputs
    text = outputs[0][0]
    assert "2 ranks meet at" in text
    assert "gloo sums a tensor over all ranks" in text
    assert "versions differ: rank 0 on" in text


def test_a_rank_that_does_not_come_is_a_problem(monkeypatch, capsys):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**place, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main(["--time-limit", "1"]) == 1
    assert "rank 0 on" in (text := capsys.readouterr().out)
    assert "do not meet at 127.0.0.1" in text
