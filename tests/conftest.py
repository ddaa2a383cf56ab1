"""What every test shares: the environment of DeepSpeed runs, real data, several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Two shared cores: a slow draw is the machine's fault, not the test's.
settings.register_profile("ci", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")

ROOT = Path(__file__).resolve().parents[1]

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "test_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def data_dir() -> Path:
    """The folder of real task data, or a skip that says how to get it."""
    path = Path(os.environ.get("SLIMFIT_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(
            f"no task data at {path}: set SLIMFIT_DATA to a folder with cola/, mrpc/, sst2/, cifar10/"
        )
    return path


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory) -> Iterator[Callable[..., list]]:
    """Runs a worker script on several ranks; returns what rank 0 printed after `RESULT `."""
    server: subprocess.Popen[str] | None = None
    log = tmp_path_factory.mktemp("ranks") / "log"

    def run(script: Path, *arguments: str, ranks: int = 2, timeout: float = 240) -> list:
        nonlocal server
        if server is None:
            server = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "rank_server.py")],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n", "tests/rank_server.py does not start"
        assert server.stdin is not None
        assert server.stdout is not None
        request = {"script": str(script), "arguments": arguments, "ranks": ranks, "timeout": timeout}
        print(json.dumps({**request, "log": str(log)}), file=server.stdin, flush=True)
        codes = json.loads(server.stdout.readline())["codes"]
        printed = [log.with_name(f"log.{rank}").read_text(errors="replace") for rank in range(ranks)]
        tails = "\n".join(f"rank {rank}:\n{text[-4000:]}" for rank, text in enumerate(printed))
        assert codes == [0] * ranks, f"{script.name} {arguments} ended with {codes}:\n{tails}"
        lines = [line for line in printed[0].splitlines() if line.startswith("RESULT ")]
        assert lines, f"{script.name} {arguments} printed no RESULT:\n{tails}"
        return json.loads(lines[-1].removeprefix("RESULT "))

    yield run
    if server is not None:
        server.kill()
        server.wait()


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
