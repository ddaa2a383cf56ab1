"""What a check finds, and running checks side by side, none of them longer than its limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["THREADS", "Check", "Finding", "Subject", "examine", "ok", "problem", "warning"]

Status = Literal["ok", "warning", "problem"]

THREADS = "slimfit doctor"
"""Name of the threads that run what may hang."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        check: what was looked at, a word or two.
        status: `ok`; `warning`: a run may do without; `problem`: a run will fail or hang.
        message: what was found, with the value.
        advice: what to do about it; empty if there is nothing to do.
    """

    check: str
    status: Status
    message: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Args:
        environment: variables of this process.
        output_dir: where runs will write.
        hostfile: DeepSpeed's list of hosts; None: none is used.
        ssh_port: where the hosts of the list listen.
        constraints: file of the tested versions; None: not at hand.
        seconds: limit of each check.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    output_dir: Path = Path("outputs")
    hostfile: Path | None = None
    ssh_port: int = 22
    constraints: Path | None = None
    seconds: float = 8.0


Check = Callable[[Subject], list[Finding]]


def ok(check: str, message: str) -> Finding:
    return Finding(check, "ok", message)


def warning(check: str, message: str, advice: str) -> Finding:
    return Finding(check, "warning", message, advice)


def problem(check: str, message: str, advice: str) -> Finding:
    return Finding(check, "problem", message, advice)


def examine(checks: Sequence[tuple[str, Check]], subject: Subject) -> list[Finding]:
    """Run all checks at the same time.

    A check that takes longer than `subject.seconds` is a problem and is left behind; so is one that raises.

    Returns:
        the findings in the order of the checks.
    """
    found: dict[int, list[Finding]] = {}

    def run(number: int, name: str, check: Check) -> None:
        try:
            found[number] = check(subject)
        except Exception as error:
            found[number] = [
                problem(
                    name, f"the check itself failed: {type(error).__name__}: {error}", "please report this"
                )
            ]

    # Daemons: a call that hangs in a driver or a file system must not keep the process alive.
    threads = [
        threading.Thread(target=run, args=(number, *named), daemon=True, name=THREADS)
        for number, named in enumerate(checks)
    ]
    for thread in threads:
        thread.start()
    end = time.monotonic() + subject.seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    results = dict(found)  # a late check adds nothing any more
    findings = []
    for number, (name, _) in enumerate(checks):
        overdue = problem(
            name, f"no answer within {subject.seconds:g} s", "see what hangs; --time-limit waits longer"
        )
        findings += results.get(number, [overdue])
    return findings
