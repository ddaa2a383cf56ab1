"""The preflight under a launcher: every rank takes part, the first one reports."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from threading import Thread

from slimfit_ds.doctor.findings import THREADS, Finding, problem
from slimfit_ds.doctor.group import meet, own_device
from slimfit_ds.doctor.members import Member, compare_members
from slimfit_ds.doctor.report import Located, exit_code, merge
from slimfit_ds.doctor.software import versions_of_this_process
from slimfit_ds.training.distributed import Ranks

__all__ = ["examine_together"]


def examine_together(
    ranks: Ranks,
    seconds: float,
    examine_machine: Callable[[], list[Finding]],
    show: Callable[[Sequence[Located], Sequence[str]], None],
) -> int:
    """Examine all machines of the run.

    Args:
        ranks: this process; its place stands in the environment already (`training.distributed.export`).
        seconds: limit for reaching the others, and for the all-reduce.
        examine_machine: the checks of one machine; made by one rank of each.
        show: prints the report; called with the machines' names on the first rank, before any rank leaves.

    Returns:
        the exit code, the same on every rank.
    """
    host = socket.gethostname()
    local: list[Finding] = []
    checks = Thread(target=lambda: local.extend(examine_machine()), daemon=True, name=THREADS)
    if ranks.local_rank == 0:
        checks.start()
    device, backend = own_device(ranks, os.environ)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        meeting = meet(ranks, seconds)
    except Exception as error:
        reason = f"rank {ranks.rank} on {host} does not reach rank 0 at {place}: {_first_line(error)}"
        advice = "is rank 0 up, is its name known here, and its port open? MASTER_ADDR and MASTER_PORT name another place"
        show([((), problem("rendezvous", reason, advice))], [host])
        return 1
    taken, failure = meeting.all_reduce(backend, device)
    if ranks.local_rank == 0:
        checks.join()
    versions = versions_of_this_process()
    meeting.tell(Member(ranks.rank, host, device, versions, tuple(local), taken, failure))
    if not ranks.is_main:
        return meeting.verdict(None)
    members = meeting.collect()
    by_host = {member.host: member.findings for member in members if member.findings}
    findings = [
        *merge(by_host),
        *(((), finding) for finding in compare_members(members, ranks.world_size, backend)),
    ]
    show(findings, list(dict.fromkeys(member.host for member in members)))
    return meeting.verdict(exit_code(findings))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
