"""What builds DeepSpeed's extensions: compiler, ninja, and the folder of builds with its locks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from slimfit_ds.doctor.findings import Finding, Subject, ok, problem, warning
from slimfit_ds.doctor.places import extensions_dir

__all__ = ["compiler", "locks"]

COMPILERS = ("c++", "g++", "clang++")
PROCESSES = Path("/proc")


def compiler(subject: Subject) -> list[Finding]:
    """A C++ compiler that answers, and ninja."""
    path = subject.environment.get("PATH", os.defpath)
    named = subject.environment.get("CXX")
    program = next(
        (found for name in ([named] if named else COMPILERS) if (found := shutil.which(name, path=path))),
        None,
    )
    findings = []
    advice = (
        "apt-get install -y g++ (needed where DeepSpeed builds an op, such as its CPU Adam for offloading)"
    )
    if program is None:
        what = (
            f"CXX names {named!r}, which is not there" if named else f"none of {', '.join(COMPILERS)} on PATH"
        )
        findings.append(warning("compiler", what, advice))
    else:
        try:
            answer = subprocess.run(
                [program, "--version"], capture_output=True, text=True, timeout=subject.seconds / 2
            )
            line = (answer.stdout.splitlines() or [""])[0]
            works = answer.returncode == 0
        except (OSError, subprocess.TimeoutExpired) as error:
            works, line = False, str(error)
        findings.append(
            ok("compiler", line) if works else warning("compiler", f"{program} does not run: {line}", advice)
        )
    # DeepSpeed looks on PATH; a run puts the folder of its Python there.
    with_python = os.pathsep.join([path, str(Path(sys.executable).parent)])
    ninja = shutil.which("ninja", path=with_python)
    findings.append(ok("ninja", ninja) if ninja else warning("ninja", "not on PATH", "pip install ninja"))
    return findings


def locks(subject: Subject) -> list[Finding]:
    """Locks in the folder of builds: the next run waits for each of them, without a word and for ever."""
    root = extensions_dir(subject.environment).expanduser()
    found = sorted(_lock_files(root))
    if not found:
        return [ok("extension builds", f"no lock in {root}")]
    holders = _holders({lock.resolve() for lock in found})
    return [_judge(lock, holders.get(lock.resolve())) for lock in found]


def _judge(lock: Path, holder: int | None) -> Finding:
    try:
        minutes = (time.time() - lock.stat().st_mtime) / 60
    except FileNotFoundError:
        return ok("extension builds", f"{lock} has just been released")
    age = f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    if holder is not None:
        return warning(
            "extension builds",
            f"{lock}, {age} old, is held by process {holder} ({_command(holder)})",
            "it is building; wait for it",
        )
    return problem(
        "extension builds",
        f"{lock}, {age} old, is held by no process of this machine: a killed build left it, and the next run waits "
        "for it for ever",
        f"rm {lock}   (unless another machine that shares this folder is building now)",
    )


def _lock_files(root: Path) -> Iterator[Path]:
    """`lock` files where torch puts them: in `root/NAME` or `root/pyVERSION_DEVICE/NAME`."""
    for pattern in ("*/lock", "*/*/lock"):
        yield from root.glob(pattern)


def _holders(files: set[Path]) -> dict[Path, int]:
    """The process that has each file open; torch keeps a lock open while it builds."""
    found = {}
    for descriptor in PROCESSES.glob("[0-9]*/fd/*"):
        try:
            target = Path(os.readlink(descriptor))
        except OSError:
            continue  # gone, or somebody else's
        if target in files:
            found[target] = int(descriptor.parts[-3])
    return found


def _command(process: int) -> str:
    try:
        words = (PROCESSES / str(process) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return "gone by now"
    return b" ".join(words).decode(errors="replace").strip()[:80]
