"""`slimfit-ds doctor`, also behind `launch/doctor.py`: alone or under any launcher."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from slimfit_ds.doctor.building import compiler, locks
from slimfit_ds.doctor.devices import devices, mpi_library
from slimfit_ds.doctor.findings import THREADS, Check, Subject, examine, problem
from slimfit_ds.doctor.group import TooLate, limited
from slimfit_ds.doctor.hostfile import hostfile
from slimfit_ds.doctor.machine import disks, limits, shared_memory
from slimfit_ds.doctor.network import hub, interfaces, own_name
from slimfit_ds.doctor.report import Located, as_json, as_text, exit_code
from slimfit_ds.doctor.software import constraints_file, packages, python, tested_versions
from slimfit_ds.doctor.together import examine_together
from slimfit_ds.training.distributed import export, read_ranks

__all__ = ["CHECKS", "main", "run"]

Checks = tuple[tuple[str, Check], ...]

CHECKS: Checks = (
    ("python", python),
    ("packages", packages),
    ("tested versions", tested_versions),
    ("devices", devices),
    ("mpi", mpi_library),
    ("compiler", compiler),
    ("extension builds", locks),
    ("disk", disks),
    ("shared memory", shared_memory),
    ("limits", limits),
    ("own name", own_name),
    ("interfaces", interfaces),
    ("hostfile", hostfile),
    ("hub", hub),
)
"""Checks of one machine, in the order of the report."""

DEFAULT_HOSTFILE = Path("/job/hostfile")
"""Where DeepSpeed looks by itself."""

GROUP_LIMITS = 2.5
"""Ranks of a large run start at different moments: meeting them may take so many times the limit of a check."""

EXAMPLES = """examples:
  slimfit-ds doctor
  slimfit-ds doctor --hostfile hostfile --output-dir /scratch/outputs
  torchrun --nproc_per_node 2 launch/doctor.py
  srun slimfit-ds doctor --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """`run` as a whole program: what hangs in a check does not keep it from ending."""
    code = run(argv)
    if any(thread.name == THREADS for thread in threading.enumerate()):
        # A call that hangs in a driver or a library would keep the interpreter from ending.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run(argv: Sequence[str] | None = None) -> int:
    """Examine this machine, and under a launcher all machines of the run together.

    Args:
        argv: the arguments after the program's name; None: those of this process.

    Returns:
        the exit code, the same on every rank: 0, or 1 if there is a problem.
    """
    arguments = _parser().parse_args(argv)
    subject = Subject(
        environment=dict(os.environ),
        output_dir=Path(arguments.output_dir),
        hostfile=_hostfile(arguments.hostfile),
        ssh_port=arguments.ssh_port,
        constraints=Path(arguments.constraints) if arguments.constraints else constraints_file(),
        seconds=arguments.time_limit,
    )
    start = time.monotonic()

    def show(
        findings: Sequence[Located], hosts: Sequence[str], ranks: int = 1, launcher: str = "python"
    ) -> None:
        seconds = round(time.monotonic() - start, 1)
        about = {"hosts": list(hosts), "ranks": ranks, "launcher": launcher, "seconds": seconds}
        if arguments.json:
            print(as_json(about, findings), flush=True)
            return
        machines = ", ".join(hosts) if len(hosts) <= 8 else f"{len(hosts)} machines"
        count = f"{ranks} rank{'s' if ranks != 1 else ''} ({launcher})"
        print(as_text(f"slimfit-ds doctor: {machines}, {count}, {seconds:g} s", findings), flush=True)

    checks = tuple(named for named in CHECKS if arguments.only is None or named[0] in arguments.only)
    return _examine(subject, checks, show)


def _examine(subject: Subject, checks: Checks, show: Callable[..., None]) -> int:
    seconds = GROUP_LIMITS * subject.seconds
    try:
        # Under mpirun the ranks come from MPI, which talks to the other machines already.
        ranks = limited(seconds, read_ranks)
    except (ValueError, TooLate) as error:
        finding = problem(
            "ranks", f"not known: {error}", "does the launcher reach all machines? try it with `hostname`"
        )
        show([((), finding)], [socket.gethostname()])
        return 1
    if ranks.world_size == 1:
        return _alone(subject, checks, show)
    export(ranks)
    return examine_together(
        ranks,
        seconds,
        lambda: examine(checks, subject),
        partial(show, ranks=ranks.world_size, launcher=ranks.launcher),
    )


def _alone(subject: Subject, checks: Checks, show: Callable[..., None]) -> int:
    findings: list[Located] = [((), finding) for finding in examine(checks, subject)]
    show(findings, [socket.gethostname()])
    return exit_code(findings)


def _hostfile(named: str | None) -> Path | None:
    if named is not None:
        return Path(named)
    return DEFAULT_HOSTFILE if DEFAULT_HOSTFILE.is_file() else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="slimfit-ds doctor",
        description="Examine this machine before a run, and under a launcher all machines of the run together.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of lines")
    parser.add_argument("--output-dir", default="outputs", help="where runs will write (outputs)")
    parser.add_argument(
        "--hostfile", help=f"hosts of deepspeed or mpirun ({DEFAULT_HOSTFILE} if it is there)"
    )
    parser.add_argument("--ssh-port", type=int, default=22, help="where these hosts listen (22)")
    parser.add_argument("--constraints", help="tested versions (constraints.txt if it is there)")
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        default=8.0,
        help=f"seconds for each check (8); meeting the other ranks may take {GROUP_LIMITS} times as long",
    )
    parser.add_argument(
        "--only",
        type=_names,
        metavar="CHECK,...",
        help=f"these checks only: {', '.join(name for name, _ in CHECKS)}",
    )
    # The deepspeed launcher hands this to every script; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser


def _names(text: str) -> list[str]:
    names, known = text.split(","), [name for name, _ in CHECKS]
    if unknown := [name for name in names if name not in known]:
        raise argparse.ArgumentTypeError(
            f"no check {', '.join(map(repr, unknown))}; there are {', '.join(known)}"
        )
    return names


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
