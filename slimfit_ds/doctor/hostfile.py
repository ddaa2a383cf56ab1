"""The list of hosts that `deepspeed --hostfile` and `mpirun --hostfile` read."""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor

from slimfit_ds.doctor.findings import Finding, Subject, ok, problem, warning

__all__ = ["hostfile", "read_hosts"]

LINE = re.compile(r"(?P<host>\S+)\s+slots\s*=\s*(?P<slots>\d+)")


def hostfile(subject: Subject) -> list[Finding]:
    """Every host of the list: written as it must be, known by name, reachable, with an ssh server."""
    if subject.hostfile is None:
        return []
    try:
        text = subject.hostfile.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [problem("hostfile", f"cannot read {subject.hostfile}: {error}", "name a file that is there")]
    hosts, wrong = read_hosts(text)
    findings = [
        problem("hostfile", line, "write one `HOST slots=N` a line, each host once") for line in wrong
    ]
    if not hosts:
        return findings or [
            problem("hostfile", f"{subject.hostfile} names no host", "write `HOST slots=N` lines")
        ]
    seconds = min(3.0, subject.seconds / 3)
    with ThreadPoolExecutor(min(64, len(hosts))) as threads:
        tried = list(threads.map(lambda host: _try(host, subject.ssh_port, seconds), hosts))
    findings += [finding for finding in tried if finding is not None]
    if not findings:
        total = f"{len(hosts)} hosts, {sum(hosts.values())} slots"
        findings.append(ok("hostfile", f"{total}, all answer at port {subject.ssh_port}"))
    return findings


def read_hosts(text: str) -> tuple[dict[str, int], list[str]]:
    """Hosts with their slots, and what is wrong with the other lines."""
    hosts: dict[str, int] = {}
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = LINE.fullmatch(content)
        if match is None:
            wrong.append(f"line {number}: {content!r} is not `HOST slots=N`")
        elif match["host"] in hosts:
            wrong.append(f"line {number}: {match['host']!r} stands there twice")
        elif int(match["slots"]) == 0:
            wrong.append(f"line {number}: {match['host']!r} has no slot")
        else:
            hosts[match["host"]] = int(match["slots"])
    return hosts, wrong


def _try(host: str, port: int, seconds: float) -> Finding | None:
    """None if the host answers."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        return problem(
            "hostfile",
            f"{host!r} has no address ({error.strerror or error})",
            "correct the name, or add it to /etc/hosts or DNS",
        )
    address = str(found[0][4][0])
    try:
        socket.create_connection((address, port), timeout=seconds).close()
    except ConnectionRefusedError:
        return warning(
            "hostfile",
            f"{host} ({address}) is up, but no ssh server listens at port {port}",
            "pdsh and mpirun need one; `deepspeed --no_ssh`, torchrun and srun do not",
        )
    except OSError as error:
        return problem(
            "hostfile",
            f"{host} ({address}) does not answer at port {port} within {seconds:g} s ({error})",
            "check that it is up, that this network leads to it, and its firewall",
        )
    return None
