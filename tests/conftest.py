"""What every test shares: the environment of DeepSpeed runs, real data, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.nn.functional as functional
from hypothesis import HealthCheck, settings

from slimfit_ds.integrations.ranks import free_port

# Two shared cores: a slow draw is the machine's fault, not the test's.
settings.register_profile("ci", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "test_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """Undo what others leave in the process: a Trainer its variables and accelerate's state, stock ZeRO 3 its `F.linear`."""
    before, linear = dict(os.environ), functional.linear
    yield
    functional.linear = linear
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
    if (deepspeed := sys.modules.get("transformers.integrations.deepspeed")) is not None:
        deepspeed.unset_hf_deepspeed_config()
    if (ours := sys.modules.get("slimfit_ds.integrations.accelerate_deepspeed")) is not None:
        ours.disable_deepspeed()


@pytest.fixture
def no_ranks(monkeypatch) -> None:
    """Child processes know nothing of the process group that `one_rank` keeps in this one."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data_dir() -> Path:
    """The folder of real task data, or a skip that says how to get it."""
    path = Path(os.environ.get("SLIMFIT_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(
            f"no task data at {path}: set SLIMFIT_DATA to a folder with cola/, mrpc/, sst2/, cifar10/"
        )
    return path


@dataclass(frozen=True)
class Launch:
    """How a launch ended.

    Args:
        codes: exit codes by rank, negative for signals.
        ended: seconds by rank since the first rank ended.
        hung: whether the server had to kill it.
        logs: what each rank printed.
    """

    codes: list[int]
    ended: list[float]
    hung: bool
    logs: list[str]


class RankServer:
    """Forks the ranks of worker scripts from one process that has imported everything."""

    def __init__(self, folder: Path):
        # A test's own environment of ranks must not reach the forked ones.
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "MASTER_"))}
        self._log = folder / "log"
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "rank_server.py")],
            env={**keep, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "tests/rank_server.py does not start"

    def launch(
        self,
        script: Path,
        *arguments: str,
        cwd: Path | None = None,
        ranks: int = 2,
        timeout: float = 240,
        grace: float = 2,
    ) -> Launch:
        """Run a script on several ranks; `grace` seconds after one has failed the others are killed."""
        request = {
            "script": str(script),
            "arguments": arguments,
            "cwd": str(cwd or script.parent),
            "ranks": ranks,
        }
        request |= {"timeout": timeout, "grace": grace, "log": str(self._log)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        reply = json.loads(self._process.stdout.readline())
        logs = [self._log.with_name(f"log.{rank}").read_text(errors="replace") for rank in range(ranks)]
        return Launch(logs=logs, **reply)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def rank_server(tmp_path_factory) -> Iterator[RankServer]:
    server = RankServer(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def run_ranks(rank_server) -> Callable[..., list]:
    """Runs a worker script on several ranks; returns what rank 0 printed after `RESULT `."""

    def run(script: Path, *arguments: str, ranks: int = 2, timeout: float = 240) -> list:
        done = rank_server.launch(script, *arguments, ranks=ranks, timeout=timeout)
        tails = "\n".join(f"rank {rank}:\n{text[-4000:]}" for rank, text in enumerate(done.logs))
        assert done.codes == [0] * ranks, f"{script.name} {arguments} ended with {done.codes}:\n{tails}"
        lines = [line for line in done.logs[0].splitlines() if line.startswith("RESULT ")]
        assert lines, f"{script.name} {arguments} printed no RESULT:\n{tails}"
        return json.loads(lines[-1].removeprefix("RESULT "))

    return run


@pytest.fixture(scope="session")
def one_rank() -> None:
    """A gloo process group of this process alone, so that engines can be made in a test."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )
    deepspeed.init_distributed("gloo")
