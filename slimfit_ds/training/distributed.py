"""Who am I among the ranks: the launcher's environment read into one small record.

Known launchers, in this order: `torchrun`, `deepspeed` and PyTorchJob (RANK, WORLD_SIZE), `mpirun` (ranks by mpi4py),
`srun` (SLURM_PROCID), plain `python` (one rank). Reading touches neither torch nor a process group.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfit_ds.training.mpi_ranks import local_rank, meeting_place, mpi_world, started_processes
from slimfit_ds.training.rendezvous import free_port, gloo_interface

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Ranks", "export", "first_slurm_host", "gather_rows", "main_rank_first", "read_ranks", "share"]


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run.

    Args:
        rank: 0 .. world_size - 1.
        local_rank: number of this process on its machine; picks the device.
        world_size: number of processes.
        launcher: what started them: `torchrun` (also `deepspeed`), `mpi`, `srun` or `python`.
        address: host name of rank 0 where the environment knows it.
        port: rendezvous port where the environment knows it.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    launcher: str = "python"
    address: str | None = None
    port: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def read_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks as the launcher's environment variables tell them.

    Raises:
        ValueError: a variable is missing or not a number; MPI does not load or is another one than the launcher's.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Ranks(
            rank=_number(environment, "RANK"),
            local_rank=_number(environment, "LOCAL_RANK", 0),
            world_size=_number(environment, "WORLD_SIZE"),
            launcher="torchrun",
            address=environment.get("MASTER_ADDR"),
            port=_number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else None,
        )
    if _is_srun(environment):
        return _slurm_ranks(environment)
    if started_processes(environment) is not None:
        return _mpi_ranks(environment)
    return Ranks()


def export(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Write the record as the variables that torch and DeepSpeed read; make `ninja` of this Python findable."""
    environment["RANK"] = str(ranks.rank)
    environment["LOCAL_RANK"] = str(ranks.local_rank)
    environment["WORLD_SIZE"] = str(ranks.world_size)
    environment["MASTER_ADDR"] = ranks.address or "127.0.0.1"
    environment["MASTER_PORT"] = str(ranks.port or free_port())
    if interface := gloo_interface(environment["MASTER_ADDR"], environment):
        environment["GLOO_SOCKET_IFNAME"] = interface
    # An interpreter called by its path has no activated environment, and DeepSpeed looks for ninja on PATH.
    programs = str(Path(sys.executable).parent)
    if programs not in environment.get("PATH", "").split(os.pathsep):
        environment["PATH"] = os.pathsep.join(filter(None, [environment.get("PATH"), programs]))


def first_slurm_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[03-05,9],login` gives `gpu03`."""
    first = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,]*)", nodes.strip())
    if first is None:
        raise ValueError(f"SLURM node list {nodes!r} names no host")
    prefix, numbers, suffix = first.groups()
    return prefix if numbers is None else prefix + re.split(r"[,-]", numbers)[0] + suffix


def share(value: Any) -> Any:
    """Rank 0's value on every rank (any picklable object)."""
    if not _many():
        return value
    import torch

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather_rows(rows: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]] | None:
    """What every rank hands in, in rank order, on rank 0; None on the other ranks."""
    if not _many():
        return [rows]
    import torch

    is_main = torch.distributed.get_rank() == 0
    everything: list[Any] | None = [None] * torch.distributed.get_world_size() if is_main else None
    torch.distributed.gather_object(rows, everything, dst=0)
    return everything


@contextmanager
def main_rank_first() -> Iterator[None]:
    """Rank 0 runs the body first (and fills caches on disk), then all the others at once."""
    if not _many():
        yield
        return
    import torch

    if torch.distributed.get_rank() != 0:
        torch.distributed.barrier()
    yield
    if torch.distributed.get_rank() == 0:
        torch.distributed.barrier()


def _many() -> bool:
    import torch

    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def _number(environment: Mapping[str, str], key: str, default: int | None = None) -> int:
    text = environment.get(key)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"environment variable {key} must be a whole number, got {text!r}") from None


def _mpi_ranks(environment: Mapping[str, str]) -> Ranks:
    """Ranks from MPI itself; rank 0 finds the meeting place and tells the others."""
    world = mpi_world(environment)
    local = local_rank(world)
    address, port = "", 0
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        address, port = meeting_place(world, local, environment)
    return Ranks(
        rank=world.Get_rank(),
        local_rank=local[0],
        world_size=world.Get_size(),
        launcher="mpi",
        address=environment.get("MASTER_ADDR", address),
        port=_number(environment, "MASTER_PORT", port),
    )


def _is_srun(environment: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as one of several.

    Not every process with `SLURM_PROCID` is: the script of `sbatch` has it too (and no step), and so have processes
    that an `mpirun` inside of a job starts by way of one task for each node.
    """
    if "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return False
    by_mpirun = "OMPI_COMM_WORLD_SIZE" in environment or "MPI_LOCALNRANKS" in environment
    return not by_mpirun and _slurm_tasks(environment) > 1


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Number of tasks of the step; the step's own count wins over the whole job's."""
    return _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))


def _slurm_ranks(environment: Mapping[str, str]) -> Ranks:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "127.0.0.1"
    if environment.get("SLURM_STEP_NUM_NODES") == "1":
        nodes = "127.0.0.1"  # one machine: a container's own name often does not resolve
    # All tasks of a step must agree on the port without talking to each other: derive it from the job. Below 32768,
    # where the system takes ports of its own choice from; another one after each requeue, as the old may linger.
    steps = _number(environment, "SLURM_STEP_ID", 0) + _number(environment, "SLURM_RESTART_COUNT", 0)
    port = 20000 + (_number(environment, "SLURM_JOB_ID", 0) + 101 * steps) % 12000
    return Ranks(
        rank=_number(environment, "SLURM_PROCID"),
        local_rank=_number(environment, "SLURM_LOCALID", 0),
        world_size=_slurm_tasks(environment),
        launcher="srun",
        address=environment.get("MASTER_ADDR") or first_slurm_host(nodes),
        port=_number(environment, "MASTER_PORT", port),
    )
