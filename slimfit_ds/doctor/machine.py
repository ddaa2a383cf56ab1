"""Room and limits of this machine: disks, shared memory, what a process may open and pin."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path

from slimfit_ds.doctor.findings import Finding, Subject, ok, problem, warning
from slimfit_ds.doctor.places import existing_parent, extensions_dir, hub_cache

__all__ = ["disks", "limits", "shared_memory"]

GIB = 2**30
LEAST_FREE, GOOD_FREE = 1 * GIB, 10 * GIB
"""Bytes. A checkpoint of a small model needs the first; base-sized models, caches and builds the second."""
TRIAL_BYTES = 2**20
GOOD_SHARED_MEMORY = 1 * GIB
"""Bytes. Docker gives 64 MiB; NCCL and loader workers of one machine take hundreds."""
GOOD_OPEN_FILES = 4096
INFINIBAND = Path("/sys/class/infiniband")
SHARED_MEMORY = Path("/dev/shm")


def disks(subject: Subject) -> list[Finding]:
    """Where runs, caches and builds write: room, and whether a file of 1 MiB can be written."""
    places = {
        "outputs": subject.output_dir,
        "hub cache": hub_cache(subject.environment),
        "extensions": extensions_dir(subject.environment),
        "temporary": Path(subject.environment.get("TMPDIR", tempfile.gettempdir())),
    }
    return [_disk(f"disk: {name}", place) for name, place in places.items()]


def shared_memory(subject: Subject) -> list[Finding]:
    """Size of /dev/shm."""
    if not SHARED_MEMORY.is_dir():
        return [warning("shared memory", f"no {SHARED_MEMORY}", "mount a tmpfs there")]
    total = shutil.disk_usage(SHARED_MEMORY).total
    text = f"{SHARED_MEMORY} has {_size(total)}"
    if total < GOOD_SHARED_MEMORY:
        return [
            warning(
                "shared memory",
                f"{text}; several ranks or loader workers on one machine want {_size(GOOD_SHARED_MEMORY)}",
                "docker run --shm-size 8g; Kubernetes: an emptyDir of medium Memory mounted at /dev/shm",
            )
        ]
    return [ok("shared memory", text)]


def limits(subject: Subject) -> list[Finding]:
    """Open files, and pinned memory where InfiniBand needs it."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    findings = []
    if files != resource.RLIM_INFINITY and files < GOOD_OPEN_FILES:
        target = GOOD_OPEN_FILES if most in (resource.RLIM_INFINITY, -1) else min(GOOD_OPEN_FILES, most)
        advice = f"ulimit -n {target}" if target > files else "raise nofile in /etc/security/limits.conf"
        findings.append(
            warning(
                "limits", f"{files} open files; many ranks and data shards want {GOOD_OPEN_FILES}", advice
            )
        )
    pinned = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if INFINIBAND.is_dir() and any(INFINIBAND.iterdir()) and pinned != resource.RLIM_INFINITY:
        findings.append(
            problem(
                "limits",
                f"InfiniBand is there and only {_size(pinned)} can be pinned: NCCL and MPI fail to register memory",
                "ulimit -l unlimited (limits.conf: memlock; docker run --ulimit memlock=-1; Slurm: PropagateResourceLimits)",
            )
        )
    return findings or [ok("limits", "unlimited open files" if files == -1 else f"{files} open files")]


def _disk(name: str, place: Path) -> Finding:
    try:
        parent = existing_parent(place)
        free = shutil.disk_usage(parent).free
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".slimfit-doctor-") as trial:
            trial.write(b"\0" * TRIAL_BYTES)
            trial.flush()
            os.fsync(trial.fileno())
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "is full" if full else "cannot be written to"
        advice = (
            "free some space, or choose another folder" if full else "choose another folder, or its rights"
        )
        return problem(name, f"{place} {what} ({error.strerror or error})", advice)
    text = f"{place}: {_size(free)} free"
    if free < LEAST_FREE:
        return problem(
            name, text, f"at least {_size(LEAST_FREE)} is needed: free some, or choose another folder"
        )
    if free < GOOD_FREE:
        return warning(
            name, text, f"checkpoints and caches of larger models need {_size(GOOD_FREE)} and more"
        )
    return ok(name, text)


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
