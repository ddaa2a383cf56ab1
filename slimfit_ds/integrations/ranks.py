"""Set the variables that torch, accelerate and DeepSpeed read the ranks from, whatever started the process.

`torchrun`, `deepspeed`, `accelerate launch` and PyTorchJob set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT themselves. Under `mpirun` MPI is asked (mpi4py), under `srun` Slurm's variables; ssh is never used.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping

from slimfit_ds.errors import ConfigError

__all__ = ["free_port", "launched_by", "set_rank_variables"]

# Open MPI; MPICH, Intel MPI and PMI; MVAPICH.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def set_rank_variables(environment: MutableMapping[str, str] = os.environ, single: bool = True) -> str:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher did not.

    Args:
        environment: the variables of this process.
        single: set them for a single `python` process as well (DeepSpeed needs them, DDP must not see them).

    Returns:
        what started this process: `torchrun` (also `deepspeed` and `accelerate launch`), `srun`, `mpirun` or `python`.

    Raises:
        ConfigError: MPI cannot be loaded, or is another one than the launcher's.
    """
    launcher = launched_by(environment)
    if launcher == "torchrun" or (launcher == "python" and not single):
        return launcher
    found = {"srun": _slurm, "mpirun": _mpi, "python": _alone}[launcher](environment)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        found[name] = environment.get(name, found[name])
    environment.update(found)
    return launcher


def launched_by(environment: Mapping[str, str] = os.environ) -> str:
    """Return what started this process, see `set_rank_variables`."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return "torchrun"
    # The script of sbatch has SLURM_PROCID too, but no step; so have ranks of an mpirun inside of a job, which starts
    # one Slurm task per node.
    in_step = "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment
    by_mpirun = "OMPI_COMM_WORLD_SIZE" in environment or "MPI_LOCALNRANKS" in environment
    if in_step and not by_mpirun and int(_slurm_tasks(environment)) > 1:
        return "srun"
    return "mpirun" if any(name in environment for name in MPI_SIZES) else "python"


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _alone(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def _slurm_tasks(environment: Mapping[str, str]) -> str:
    """Return the tasks of this step; the job's own number may be another one."""
    return environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")


def _slurm(environment: Mapping[str, str]) -> dict[str, str]:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "127.0.0.1"
    one_node = environment.get("SLURM_STEP_NUM_NODES") == "1"
    # All tasks must agree on a port without a message: derive it from the job. Below 32768, where the system takes
    # ports of its own choice from; another one after each requeue, because the old one may linger.
    start = int(environment.get("SLURM_STEP_ID", 0)) + int(environment.get("SLURM_RESTART_COUNT", 0))
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": _slurm_tasks(environment),
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": "127.0.0.1" if one_node else _first_host(nodes),
        "MASTER_PORT": str(20000 + (int(environment.get("SLURM_JOB_ID", 0)) + 101 * start) % 12000),
    }


def _first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: `gpu[03-05,9],login` gives `gpu03`."""
    found = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,]*)", nodes.strip())
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST names no host, got {nodes!r}; set MASTER_ADDR")
    prefix, numbers, suffix = found.groups()
    return prefix if numbers is None else prefix + re.split(r"[,-]", numbers)[0] + suffix


def _mpi(environment: Mapping[str, str]) -> dict[str, str]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            [
                f"mpi4py is missing or cannot load an MPI library ({reason}); pip install 'slimfit_ds[mpi]', or load "
                "your MPI module"
            ]
        ) from None
    world = MPI.COMM_WORLD
    name = next(name for name in MPI_SIZES if name in environment)
    if environment[name] != str(world.Get_size()):
        library = MPI.Get_library_version().strip().splitlines()[0]
        raise ConfigError(
            [
                f"the launcher started {environment[name]} processes ({name}), mpi4py sees {world.Get_size()}: it uses "
                f"{library!r}, not the launcher's MPI, and every process would train alone; use the mpirun of that "
                "library, or point MPI4PY_LIBMPI to the launcher's"
            ]
        )
    machine = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_machine = machine.Get_size() == world.Get_size()
    address, port = world.bcast(("127.0.0.1" if one_machine else _own_address(), free_port()), root=0)
    return {
        "RANK": str(world.Get_rank()),
        "WORLD_SIZE": str(world.Get_size()),
        "LOCAL_RANK": str(machine.Get_rank()),
        "LOCAL_WORLD_SIZE": str(machine.Get_size()),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def _own_address() -> str:
    """Return the address of this machine on its default route, or its name where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
