"""The launcher behind a rank: found by its command line, missed when it is gone."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from slimfit_ds.training import launcher
from slimfit_ds.training.launcher import Launcher, find_launcher


@pytest.mark.parametrize(
    ("lines", "watched", "command"),
    [
        ([["python", "/bin/torchrun", "--nproc_per_node", "2", "t.py"], ["bash"]], 1, 0),
        ([["python", "-m", "torch.distributed.run", "t.py"], ["bash"]], 1, 0),
        ([["python", "/bin/accelerate", "launch", "t.py"], ["bash"]], 1, 0),
        ([["mpirun", "-n", "2", "python", "t.py"], ["bash"]], 1, 0),
        (
            [
                ["python", "-u", "-m", "deepspeed.launcher.launch", "--x"],
                ["python", "/bin/deepspeed", "t.py"],
            ],
            2,
            1,
        ),
        ([["python", "-u", "-m", "deepspeed.launcher.launch", "--x"], ["sshd"]], 1, None),
        ([["bash", "job.sh"], ["slurmstepd"]], 0, None),
        ([["python", "deepspeed_study.py"], ["bash"]], 0, None),
    ],
)
def test_what_started_this_rank(monkeypatch, lines, watched, command):
    parents = [SimpleNamespace(cmdline=lambda line=line: line, pid=1) for line in lines]
    monkeypatch.setattr(launcher.psutil, "Process", lambda: SimpleNamespace(parents=lambda: parents))
    found = find_launcher()
    assert len(found.processes) == watched
    assert found.command == (None if command is None else tuple(lines[command]))


def test_a_launcher_that_ends_is_missed():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    found = Launcher((psutil.Process(process.pid),))
    assert found.lost() is None
    process.kill()
    process.wait()
    assert found.lost() == f"process {process.pid}"


def test_the_command_to_go_on_is_one_for_a_shell():
    found = Launcher(command=("torchrun", "t.py", "task={name: x}", "output_dir=out"))
    again = found.again(["output_dir=out", "resume=auto"])
    assert again == "torchrun t.py 'task={name: x}' output_dir=out resume=auto"
