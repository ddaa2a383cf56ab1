"""Where the ranks meet: an address of rank 0 that the other machines were seen to reach.

A host name is a bad guess: in a container it often resolves on its own machine only, and on a Debian machine to a
loopback address. So rank 0 opens a port, offers every address it has, and the others try them.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = [
    "Meeting",
    "choose",
    "free_port",
    "gloo_interface",
    "offer",
    "own_addresses",
    "own_name_is_local_only",
    "reachable",
]

SECONDS = 3.0
"""How long an address may take to answer."""

BRIDGES = ("docker", "br-", "virbr", "cni", "podman")
"""Interfaces that look alike on every machine and lead to none of the others."""


@dataclass(frozen=True)
class Meeting:
    """What rank 0 tells the others.

    Args:
        addresses: its addresses, the likeliest first.
        port: where it listens.
        token: what it answers; another machine with the same address cannot know it.
    """

    addresses: tuple[str, ...]
    port: int
    token: bytes


def own_addresses(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Addresses of this machine that another one might reach.

    Returns:
        those of the interface that `NCCL_SOCKET_IFNAME` or `GLOO_SOCKET_IFNAME` names first, then that of the host
        name, then the others; loopback and link-local ones never.
    """
    asked = [
        name.strip("=^")
        for key in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
        for name in environment.get(key, "").split(",")
        if name and not name.startswith("^")
    ]
    named = _resolved(socket.gethostname())

    def rank(found: tuple[str, str]) -> tuple[bool, bool, bool, bool]:
        interface, address = found
        return (
            not any(interface.startswith(name) for name in asked),
            address not in named,
            interface.startswith(BRIDGES),
            ":" in address,
        )

    return tuple(address for _, address in sorted(_interface_addresses(), key=rank))


def own_name_is_local_only() -> bool:
    """Whether this machine's own name gives no address that another machine could use."""
    return not any(_is_routable(address) for address in _resolved(socket.gethostname()))


def gloo_interface(address: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The interface that gloo has to be told about, None where it finds it or none is needed.

    Gloo listens on the address that the host name resolves to. Where this is a loopback address (Debian's `127.0.1.1`)
    or none, other machines cannot connect; the interface on the way to rank 0 is then the right one.

    Args:
        address: name or address of rank 0.
    """
    if environment.get("GLOO_SOCKET_IFNAME") or not own_name_is_local_only():
        return None
    routable = [found for found in _resolved(address) if _is_routable(found)]
    if routable:
        source = _source_towards(routable[0])
    else:
        # Rank 0's own machine, or a run on one machine only: the launcher knows which.
        here = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE")
        is_one_machine = here is None or here == environment.get("WORLD_SIZE")
        source = None if is_one_machine else next(iter(own_addresses(environment)), None)
    return next((name for name, own in _interface_addresses() if own == source), None)


@contextmanager
def offer(environment: Mapping[str, str] = os.environ) -> Iterator[Meeting]:
    """Listen on a free port of all interfaces while the others try to reach it."""
    token = secrets.token_bytes(16)
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", 0))
        server.listen(1024)
        threading.Thread(target=_answer, args=(server, token), daemon=True).start()
        yield Meeting(own_addresses(environment), server.getsockname()[1], token)
        server.shutdown(socket.SHUT_RDWR)


def reachable(meeting: Meeting, seconds: float = SECONDS) -> list[bool]:
    """Which of the offered addresses lead to rank 0 from here."""
    if not meeting.addresses:
        return []
    with ThreadPoolExecutor(len(meeting.addresses)) as threads:
        return list(threads.map(lambda address: _answers(address, meeting, seconds), meeting.addresses))


def choose(addresses: Sequence[str], seen: Sequence[Sequence[bool]]) -> str | None:
    """The first address that everybody reached.

    Args:
        addresses: what rank 0 offered.
        seen: a row from `reachable` for each rank that tried.
    """
    return next(
        (address for number, address in enumerate(addresses) if all(row[number] for row in seen)), None
    )


def free_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _answer(server: socket.socket, token: bytes) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return
        with connection:
            try:
                connection.sendall(token)
            except OSError:
                continue


def _answers(address: str, meeting: Meeting, seconds: float) -> bool:
    try:
        with socket.create_connection((address, meeting.port), timeout=seconds) as connection:
            connection.settimeout(seconds)
            return connection.recv(len(meeting.token), socket.MSG_WAITALL) == meeting.token
    except OSError:
        return False


def _source_towards(address: str) -> str | None:
    """The own address from which packets to this one leave."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # a datagram socket: nothing is sent
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _interface_addresses() -> list[tuple[str, str]]:
    """(interface, address) of everything that leads outside, what is connected first."""
    import psutil

    # A cable that was plugged in a moment ago counts as not connected for a second: such ones are last, not left out.
    connected = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        (interface, address.address)
        for interface, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and _is_routable(address.address)
    ]
    return sorted(found, key=lambda each: each[0] not in connected)


def _resolved(name: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def _is_routable(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    return not (found.is_loopback or found.is_link_local or found.is_unspecified)
