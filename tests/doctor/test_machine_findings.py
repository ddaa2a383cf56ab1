"""Checks of one machine (`doctor/{machine,building,network,hostfile,software}.py`): each thing broken, and its line."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from slimfit_ds.doctor import building, machine, network, software
from slimfit_ds.doctor.findings import Finding, Subject, examine, ok
from slimfit_ds.doctor.hostfile import hostfile, read_hosts


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


# versions


@pytest.fixture
def installed(monkeypatch):
    """Pretend that these versions are installed (None: not at all)."""
    real = software.version

    def pretend(**versions: str | None):
        def version(name: str) -> str:
            if name in versions:
                if versions[name] is None:
                    raise software.PackageNotFoundError(name)
                return versions[name]
            return real(name)

        monkeypatch.setattr(software, "version", version)

    return pretend


def test_versions_of_this_environment_are_fine():
    assert [finding.status for finding in software.packages(Subject())] == ["ok"]
    assert only(software.python(Subject())).status == "ok"


def test_a_version_out_of_the_range_of_pyproject(installed):
    installed(deepspeed="0.16.1", transformers="4.50.0")
    found = only(software.packages(Subject()))
    assert found.status == "problem"
    assert "deepspeed 0.16.1 (needs ==0.19.*)" in found.message
    assert "transformers 4.50.0 (needs <6,>=5.17)" in found.message


def test_a_package_that_is_missing_and_an_extra_that_may_be(installed):
    installed(safetensors=None, peft=None)
    found = only(software.packages(Subject()))
    assert found.status == "problem"
    assert "safetensors" in found.message
    assert "peft" not in found.message
    assert found.advice.startswith("pip install 'safetensors")


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(software.platform, "python_version", lambda: "3.9.2")
    assert only(software.python(Subject())).status == "problem"


def test_versions_other_than_the_tested_ones(tmp_path, installed):
    installed(torch="2.11.0+cu130", numpy="2.4.6")
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(
        "--extra-index-url https://nowhere\ntorch==2.13.0\nnumpy==2.4.6  # why\nnot-there==1\n"
    )
    found = only(software.tested_versions(Subject(constraints=constraints)))
    assert found.status == "warning"
    assert "1 of 2 differ: torch 2.11.0+cu130 (tested ==2.13.0)" in found.message
    assert software.tested_versions(Subject()) == []


# disks and limits


def test_disks_of_this_machine(tmp_path):
    findings = machine.disks(Subject({"HOME": str(tmp_path)}, output_dir=tmp_path / "new" / "outputs"))
    assert [finding.check for finding in findings] == [
        "disk: outputs",
        "disk: hub cache",
        "disk: extensions",
        "disk: temporary",
    ]
    assert list(tmp_path.iterdir()) == []  # nothing is made, nothing is left


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_an_output_folder_that_cannot_be_written(tmp_path, kind):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "outputs" if kind == "file" else Path("/proc/1/outputs")
    found = machine.disks(Subject({}, output_dir=place))[0]
    assert (found.check, found.status) == ("disk: outputs", "problem")
    assert "cannot be written to" in found.message
    assert str(place) in found.message


def test_a_full_disk(tmp_path):
    """A real one of 64 KiB, less than the trial file."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        found = machine.disks(Subject({}, output_dir=tmp_path / "outputs"))[0]
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert found.status == "problem"
    assert "is full" in found.message


@pytest.mark.parametrize(("free", "status"), [(2**29, "problem"), (2**32, "warning"), (2**35, "ok")])
def test_little_room(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2**40, 0, free))
    assert machine.disks(Subject({}, output_dir=tmp_path))[0].status == status


def test_the_shared_memory_that_docker_gives(monkeypatch):
    monkeypatch.setattr(
        machine.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(64 * 2**20, 0, 64 * 2**20)
    )
    found = only(machine.shared_memory(Subject()))
    assert found.status == "warning"
    assert "has 64 MiB" in found.message
    assert "--shm-size" in found.advice


def test_limits(monkeypatch, tmp_path):
    values = {resource.RLIMIT_NOFILE: (1024, 524288), resource.RLIMIT_MEMLOCK: (65536, 65536)}
    monkeypatch.setattr(machine.resource, "getrlimit", values.__getitem__)
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path / "none")
    found = only(machine.limits(Subject()))
    assert (found.status, found.advice) == ("warning", "ulimit -n 4096")
    (tmp_path / "none" / "mlx5_0").mkdir(parents=True)
    pinned = machine.limits(Subject())[1]
    assert pinned.status == "problem"
    assert "64 KiB can be pinned" in pinned.message


# extensions


def subject_of(root: Path, **more: str) -> Subject:
    return Subject({"TORCH_EXTENSIONS_DIR": str(root), "PATH": os.environ["PATH"], **more})


def test_a_lock_that_a_killed_build_left(tmp_path):
    """As torch makes it, by a process that is killed while it holds it."""
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    code = (
        "import sys, time; from torch.utils.file_baton import FileBaton; "
        f"assert FileBaton({str(lock)!r}).try_acquire(); print('held', flush=True); time.sleep(60)"
    )
    builder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert builder.stdout is not None
        assert builder.stdout.readline().strip() == "held"
        held = only(building.locks(subject_of(tmp_path)))
        assert held.status == "warning"
        assert f"held by process {builder.pid} (" in held.message
    finally:
        builder.kill()
        builder.wait()
    os.utime(lock, (time.time() - 600, time.time() - 600))
    stale = only(building.locks(subject_of(tmp_path)))
    assert stale.status == "problem"
    assert f"{lock}, 10 min old, is held by no process" in stale.message
    assert f"rm {lock}" in stale.advice
    lock.unlink()
    assert only(building.locks(subject_of(tmp_path))).status == "ok"


def test_locks_without_the_folder_of_the_device(tmp_path):
    (tmp_path / "fused_adam").mkdir()
    (tmp_path / "fused_adam" / "lock").touch()
    assert only(building.locks(subject_of(tmp_path))).status == "problem"


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(building.sys, "executable", str(tmp_path / "python"))
    compiler, ninja = building.compiler(Subject({"PATH": str(tmp_path)}))
    assert (compiler.status, ninja.status) == ("warning", "warning")
    assert "none of c++, g++, clang++" in compiler.message
    assert ninja.advice == "pip install ninja"


def test_a_compiler_that_does_not_run(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    assert (
        "does not run" in building.compiler(Subject({"PATH": f"{tmp_path}:{os.environ['PATH']}"}))[0].message
    )
    named = building.compiler(subject_of(tmp_path, CXX="no-such-compiler"))[0]
    assert "CXX names 'no-such-compiler'" in named.message


# network


class Hub(BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub_server():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("answer", "status"), [(200, "ok"), (404, "ok"), (403, "warning"), (503, "warning")])
def test_the_hub_answers(hub_server, monkeypatch, answer, status):
    monkeypatch.setattr(Hub, "status", answer)
    found = only(network.hub(Subject({"HF_ENDPOINT": hub_server + "/"})))
    assert found.status == status
    assert str(answer) in found.message


def test_no_hub():
    found = only(network.hub(Subject({"HF_ENDPOINT": "http://127.0.0.1:9"})))
    assert found.status == "warning"
    assert "HF_HUB_OFFLINE=1" in found.advice
    assert only(network.hub(Subject({"HF_ENDPOINT": "not a url"}))).status == "warning"


def test_offline_asks_nobody(monkeypatch):
    monkeypatch.setattr(
        network.urllib.request, "urlopen", lambda *given, **more: pytest.fail("asked the hub")
    )
    found = only(network.hub(Subject({"TRANSFORMERS_OFFLINE": "1"})))
    assert found.status == "ok"
    assert "TRANSFORMERS_OFFLINE" in found.message


def test_an_interface_that_is_not_there():
    environment = {"GLOO_SOCKET_IFNAME": "eth77", "NCCL_SOCKET_IFNAME": "^docker,lo"}
    found = only(network.interfaces(Subject(environment)))
    assert found.status == "problem"
    assert "GLOO_SOCKET_IFNAME names 'eth77'" in found.message
    assert network.interfaces(Subject({"NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"})) == []
    assert only(network.interfaces(Subject({"NCCL_SOCKET_IFNAME": "=l"}))).status == "problem"


# the list of hosts


def test_lines_of_a_hostfile():
    text = "# all\na slots=8\n\nb slots=4 # half\nc\na slots=1\nd slots=x\ne slots=0\n"
    hosts, wrong = read_hosts(text)
    assert hosts == {"a": 8, "b": 4}
    assert [line.partition(":")[0] for line in wrong] == ["line 5", "line 6", "line 7", "line 8"]


@pytest.fixture
def listener():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def write(folder: Path, text: str) -> Path:
    path = folder / "hostfile"
    path.write_text(text)
    return path


def test_hosts_that_answer(tmp_path, listener):
    path = write(tmp_path, "localhost slots=2\n127.0.0.1 slots=1\n")
    found = only(hostfile(Subject(hostfile=path, ssh_port=listener)))
    assert (found.status, found.message.partition(",")[0]) == ("ok", "2 hosts")


def test_hosts_that_do_not(tmp_path, listener):
    path = write(tmp_path, "no-such-host.invalid slots=1\n127.0.0.1 slots=1\nbad line\n")
    findings = hostfile(Subject(hostfile=path, ssh_port=listener))
    assert [finding.status for finding in findings] == ["problem"] * 2
    assert "line 3: 'bad line'" in findings[0].message
    assert "'no-such-host.invalid' has no address" in findings[1].message


def test_a_host_that_stays_silent(tmp_path):
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)  # room for one: whoever comes later waits
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        port = server.getsockname()[1]
        path = write(tmp_path, "127.0.0.1 slots=1\n")
        found = only(hostfile(Subject(hostfile=path, ssh_port=port, seconds=1.5)))
    assert found.status == "problem"
    assert f"127.0.0.1 (127.0.0.1) does not answer at port {port} within 0.5 s" in found.message


def test_a_host_without_ssh_is_fine_for_other_launchers(tmp_path, listener):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    found = only(hostfile(Subject(hostfile=write(tmp_path, "127.0.0.1 slots=1\n"), ssh_port=closed)))
    assert found.status == "warning"
    assert "--no_ssh" in found.advice


def test_a_hostfile_that_is_not_there(tmp_path):
    assert only(hostfile(Subject(hostfile=tmp_path / "none"))).status == "problem"
    assert only(hostfile(Subject(hostfile=write(tmp_path, "# nobody\n")))).status == "problem"
    assert hostfile(Subject()) == []


# running them


def test_a_check_that_hangs_or_raises_costs_one_line():
    def hangs(subject):
        time.sleep(30)

    def raises(subject):
        raise RuntimeError("out of paper")

    start = time.monotonic()
    findings = examine(
        [("first", lambda subject: [ok("first", "fine")]), ("slow", hangs), ("broken", raises)],
        Subject(seconds=0.3),
    )
    assert time.monotonic() - start < 5
    assert [(finding.check, finding.status) for finding in findings] == [
        ("first", "ok"),
        ("slow", "problem"),
        ("broken", "problem"),
    ]
    assert "no answer within 0.3 s" in findings[1].message
    assert "out of paper" in findings[2].message
