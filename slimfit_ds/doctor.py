"""`slimfit-ds doctor`: checks before a run that `ds_report` and `accelerate env` lack.

Alone: leftover locks of extension builds, compiler and ninja, shared memory. Under a launcher also: whether the ranks
reach each other, run the same versions, and sum a tensor.

    slimfit-ds doctor
    torchrun --nproc_per_node 2 -m slimfit_ds.doctor
    srun slimfit-ds doctor
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

__all__ = ["Finding", "check_machine", "check_ranks", "main"]

PACKAGES = ("slimfit_ds", "torch", "deepspeed", "transformers", "accelerate")
SHARED_MEMORY = 2**30
"""Bytes; Docker's default is 64 MiB, which several ranks and loader workers use up."""


@dataclass(frozen=True)
class Finding:
    """A line of the report.

    Args:
        status: `ok`; `warning`: a run may do without; `problem`: a run will fail or hang.
        text: what was found, with the value.
        remedy: what to do about it.
    """

    status: Literal["ok", "warning", "problem"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.status:8} {self.text}" + (f"\n         -> {self.remedy}" if self.remedy else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings of this machine, and under a launcher those of all ranks.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        the exit code: 1 if there is a problem.
    """
    parser = argparse.ArgumentParser(
        prog="slimfit-ds doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--time-limit", type=float, default=30.0, metavar="SECONDS", help="for the ranks to meet (30)"
    )
    # The deepspeed launcher hands this to every script; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    environment = os.environ
    from slimfit_ds.integrations.ranks import launched_by, set_rank_variables

    findings = []
    if launched_by(environment) != "python":
        try:
            set_rank_variables(environment)
            findings += check_ranks(environment, arguments.time_limit)
        except ValueError as error:
            findings.append(Finding("problem", f"ranks: {error}"))
    # One rank of each machine looks at it; rank 0 speaks for all about the ranks together.
    if environment.get("LOCAL_RANK", "0") == "0":
        findings = check_machine(environment) + findings
    text = "\n".join(map(str, findings))
    if text:
        print(f"slimfit-ds doctor: {socket.gethostname()}\n{text}", flush=True)
    return int(any(finding.status == "problem" for finding in findings))


def check_machine(environment: Mapping[str, str], shared_memory: Path = Path("/dev/shm")) -> list[Finding]:
    """Look at this machine; imports neither torch nor DeepSpeed."""
    path = os.pathsep.join([environment.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    findings = list(_locks(environment))
    compiler = environment.get("CXX", "c++")
    for program, remedy in ((compiler, "apt-get install -y g++"), ("ninja", "pip install ninja")):
        found = shutil.which(program, path=path)
        if found is None:
            what = f"{program} is not on PATH; DeepSpeed builds extensions such as its CPU Adam with it"
            findings.append(Finding("warning", what, remedy))
        else:
            findings.append(Finding("ok", f"{program}: {found}"))
    if shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free
        text = f"{free / 2**30:.2f} GiB free in {shared_memory}"
        remedy = "docker run --shm-size 8g; in a pod mount an emptyDir with medium: Memory there"
        small = free < SHARED_MEMORY
        findings.append(Finding("warning" if small else "ok", text, remedy if small else ""))
    return findings


def _locks(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Locks of extension builds: the next run waits for each of them without a word and without end."""
    cache = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", Path.home())) / ".cache"
    root = Path(environment.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    if not locks:
        yield Finding("ok", f"no build lock in {root}")
    for lock in locks:
        minutes = (time.time() - lock.stat().st_mtime) / 60
        if _is_open(lock):
            yield Finding("warning", f"{lock} is held by a build, {minutes:.0f} min old", "wait for it")
        else:
            yield Finding(
                "problem",
                f"{lock}, {minutes:.0f} min old, is held by no process of this machine: a killed build left it, and the "
                "next run waits for it without end",
                f"rm {lock}   (unless another machine that shares this folder builds now)",
            )


def _is_open(file: Path) -> bool:
    """Return whether a process of this machine has a file open; torch keeps a lock open while it builds."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.samefile(file):
                return True
        except OSError:
            continue  # gone, or another user's
    return False


def check_ranks(environment: Mapping[str, str], seconds: float) -> list[Finding]:
    """Meet the other ranks that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; called by every rank.

    Args:
        environment: with these variables.
        seconds: limit for reaching rank 0, and for the all-reduce.

    Returns:
        what is wrong, on every rank; what is right, on rank 0.
    """
    import torch
    from torch import distributed as dist

    rank, world, host = int(environment["RANK"]), int(environment["WORLD_SIZE"]), socket.gethostname()
    place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    device = f"cuda:{environment['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu"
    backend = "gloo" if device == "cpu" else "nccl"
    limit = timedelta(seconds=seconds)
    try:
        store, _, _ = next(dist.rendezvous(f"env://?rank={rank}&world_size={world}", timeout=limit))
        store.set_timeout(limit)
        store.set(f"versions/{rank}", json.dumps([host, _versions()]))
        everyone = [store.get(f"versions/{other}").decode() for other in range(world)]
    except Exception as error:
        text = f"rank {rank} on {host} and all {world} ranks do not meet at {place}: {_first_line(error)}"
        return [
            Finding("problem", text, "are all ranks up, the name known here, the ports open? Set MASTER_ADDR")
        ]
    findings = [Finding("ok", f"{world} ranks meet at {place}")]
    by_versions: dict[str, list[str]] = {}
    for number, text in enumerate(everyone):
        name, versions = json.loads(text)
        by_versions.setdefault(versions, []).append(f"rank {number} on {name}")
    if len(by_versions) > 1:
        text = "; ".join(f"{', '.join(who)}: {versions}" for versions, who in by_versions.items())
        findings.append(
            Finding("problem", f"versions differ: {text}", "install the same versions everywhere")
        )
    else:
        findings.append(Finding("ok", f"all ranks have {next(iter(by_versions))}"))
    try:
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        values = torch.full((2**18,), rank + 1.0, device=device)
        dist.all_reduce(values)
        total, expected = values[-1].item(), world * (world + 1) / 2
        if total != expected:
            raise ArithmeticError(f"the sum is {total}, not {expected}")
        findings.append(Finding("ok", f"{backend} sums a tensor over all ranks"))
        dist.destroy_process_group()
    except Exception as error:
        name = "NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        text = f"rank {rank} on {host}: all-reduce by {backend} fails: {_first_line(error)}"
        findings.append(
            Finding("problem", text, f"open the ports between the machines, or name the interface: {name}")
        )
    return findings if rank == 0 else [finding for finding in findings if finding.status != "ok"]


def _versions() -> str:
    found = [f"python {sys.version.split()[0]}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    sys.exit(main())
