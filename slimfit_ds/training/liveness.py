"""Who among the ranks is still alive: no rank waits for ever for one that is gone, and all can name it.

Each rank counts up a number in the store of the process group, and looks at the number of the rank before it, and at
the processes of the ranks on its own machine. What it finds it writes into the store, for all to read. That is one
small request or two per second and rank, whatever the number of ranks.

    here/RANK    {"host", "pid", "born"}            written once
    beat/RANK    a number that grows                 written every second
    end/RANK     {"how", "what"}                     `how` is lost, failed or followed (ended because of another one)
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch

from slimfit_ds.training.distributed import Ranks
from slimfit_ds.training.endings import LostRankError

__all__ = ["Liveness"]

BEAT = 1.0
"""Seconds between two signs of life."""

GRACE = 5.0
"""Seconds that the main thread has to end by itself after another rank was found lost."""


@dataclass(frozen=True)
class _Place:
    """Where a rank runs; a process number means something only inside one name space."""

    host: str
    pid: int
    born: float

    @staticmethod
    def here() -> _Place:
        try:
            space = os.readlink("/proc/self/ns/pid")
        except OSError:
            space = ""
        process = psutil.Process()
        return _Place(f"{socket.gethostname()} {space}".strip(), process.pid, process.create_time())

    def is_gone(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            # A dead process keeps its number until its parent looks; a new one may have taken it since.
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.born) > 1.0
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


class Liveness:
    """Signs of life of this rank, and a judgement on the others.

    Args:
        ranks: this process among all.
        limit: seconds without a sign of life after which a rank counts as lost.
        advice: what a message about a lost rank ends with; asked when one is lost.
        launcher_holds_store: whether the store lives in the launcher instead of rank 0.
    """

    def __init__(
        self,
        ranks: Ranks,
        limit: float,
        advice: Callable[[], str],
        *,
        launcher_holds_store: bool = "TORCHELASTIC_USE_AGENT_STORE" in os.environ,
    ):
        self._ranks, self._limit, self._advice = ranks, limit, advice
        self._launcher_holds_store = launcher_holds_store
        self._beat = min(BEAT, limit / 4)
        self._found: dict[int, str] = {}
        self._is_found, self._taken_over = threading.Event(), threading.Event()
        self._last_answer = time.monotonic()
        self._store_lost: str | None = None

    def start(self) -> None:
        """Begin; called by every rank, after the process group is there."""
        if self._ranks.world_size == 1:
            return
        # Stores are not safe to share between threads, and a wait in the main one would silence this one.
        self._store = self._own_store()
        here = _Place.here()
        self._store.set(f"here/{self._ranks.rank}", json.dumps(vars(here)))
        self._store.set(f"beat/{self._ranks.rank}", "0")
        torch.distributed.barrier()
        others = [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]
        texts = self._store.multi_get([f"here/{rank}" for rank in others])
        self._places = {rank: _Place(**json.loads(text)) for rank, text in zip(others, texts, strict=True)}
        self._neighbours = [rank for rank in others if self._places[rank].host == here.host]
        self._last_answer = time.monotonic()
        for work in (self._pulse, self._judge):
            threading.Thread(target=work, name=f"slimfit-{work.__name__}", daemon=True).start()

    def stop(self) -> None:
        """End without a judgement: the run is over."""
        self._taken_over.set()
        self._is_found.set()

    def explain(self, error: BaseException) -> LostRankError | None:
        """What an error of the main thread comes from: another rank, or this one (None).

        An error of communication waits here until it is known who was lost. The reason is left in the store, so that
        the others blame the right rank.
        """
        if self._ranks.world_size == 1 or not hasattr(self, "_neighbours"):
            return None
        if _is_of_communication(error):
            # Two looks at the neighbour, and the store's own silence, fit into this.
            self._is_found.wait(self._limit + 5 * self._beat + 2.0)
        self._taken_over.set()
        if not self._found:
            self._tell(self._ranks.rank, "failed", f"{type(error).__name__}: {_first_line(error)}")
            return None
        self._tell(self._ranks.rank, "followed", "")
        return LostRankError(self._message())

    def _own_store(self) -> Any:
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        store = _get_default_store().clone()  # type: ignore[attr-defined]
        store.set_timeout(timedelta(seconds=max(self._limit, 5.0)))
        return PrefixStore("slimfit_liveness", store)

    def _pulse(self) -> None:
        """The only thread that talks to the store; it may block in there."""
        before = (self._ranks.rank - 1) % self._ranks.world_size
        number, seen, since = 0, b"", time.monotonic()
        while not self._taken_over.wait(self._beat):
            number += 1
            try:
                self._store.set(f"beat/{self._ranks.rank}", str(number))
                now = self._store.get(f"beat/{before}")
                if self._store.add("ends", 0) > 0:
                    self._read_ends()
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > self._limit:
                    self._declare_silent()
                for rank in self._neighbours:
                    if self._places[rank].is_gone() and not self._has_ended(rank):
                        place = self._places[rank]
                        self._tell(
                            rank, "lost", f"its process {place.pid} on {place.host.split()[0]} is gone"
                        )
            except Exception as error:  # torch's own and the system's errors of a broken connection
                self._blame_store(_first_line(error))
                return
            self._last_answer = time.monotonic()

    def _declare_silent(self) -> None:
        """Every rank that does not count up any more; a whole machine falls silent at once."""
        everyone = range(self._ranks.world_size)
        keys = [f"beat/{rank}" for rank in everyone]
        earlier = self._store.multi_get(keys)
        time.sleep(3 * self._beat)
        for rank, old, new in zip(everyone, earlier, self._store.multi_get(keys), strict=True):
            if old == new and rank != self._ranks.rank and not self._has_ended(rank):
                where = self._places[rank].host.split()[0]
                self._tell(rank, "lost", f"no sign of life for {self._limit:g} s from {where}")

    def _has_ended(self, rank: int) -> bool:
        return self._store.check([f"end/{rank}"])

    def _tell(self, rank: int, how: str, what: str) -> None:
        """Write down how a rank ended, for the others to read; the store may be gone with it."""
        if how != "followed" and rank != self._ranks.rank:
            self._found[rank] = f"rank {rank} was lost: {what}"
            self._is_found.set()
        if self._store_lost is not None:
            return

        def write() -> None:
            with suppress(Exception):
                self._store.set(f"end/{rank}", json.dumps({"how": how, "what": what}))
                self._store.add("ends", 1)

        # A store whose process is stopped takes requests and never answers.
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(2.0)

    def _read_ends(self) -> None:
        for rank in self._places:
            if rank in self._found or not self._has_ended(rank):
                continue
            end = json.loads(self._store.get(f"end/{rank}"))
            if end["how"] != "followed":
                self._found[rank] = (
                    f"rank {rank} {'failed' if end['how'] == 'failed' else 'was lost'}: {end['what']}"
                )
        if self._found:
            self._is_found.set()

    def _blame_store(self, what: str) -> None:
        self._store_lost = what
        self._blame_neighbours()
        is_on_this_machine = self._ranks.rank == 0 or 0 in self._neighbours
        if self._launcher_holds_store and is_on_this_machine:
            # Without its launcher a rank is asked to stop (see `stop_signals`); the ranks can still do that together.
            # On another machine the launcher lives on, and waits for the store itself.
            return
        if self._ranks.rank != 0 and 0 not in self._found:
            host = self._places[0].host.split()[0]
            self._found[0] = f"rank 0 was lost: the store that it holds on {host} does not answer ({what})"
        self._is_found.set()

    def _blame_neighbours(self) -> None:
        for rank in self._neighbours:
            place = self._places[rank]
            if place.is_gone():
                self._found[rank] = (
                    f"rank {rank} was lost: its process {place.pid} on {place.host.split()[0]} is gone"
                )
        if self._found:
            self._is_found.set()

    def _judge(self) -> None:
        """End this process where the main thread cannot, because it waits inside a collective."""
        looked = time.monotonic()
        while not self._is_found.wait(self._beat):
            pause, looked = time.monotonic() - looked, time.monotonic()
            if pause > 2 * self._beat + 1.0:
                # This process itself was stopped (a suspended job): nobody else's silence can be told from its own.
                self._last_answer = looked
            silence = looked - self._last_answer
            if self._store_lost is None and silence > self._limit + 5 * self._beat:
                self._blame_store(f"silent for {silence:.0f} s")
        if self._taken_over.wait(GRACE):
            return
        self._tell(self._ranks.rank, "followed", "")
        print(self._message(), file=sys.stderr, flush=True)
        os._exit(LostRankError.exit_code)

    def _message(self) -> str:
        lost = "; ".join(self._found[rank] for rank in sorted(self._found))
        return f"rank {self._ranks.rank} ends: {lost}. {self._advice()}"


def _is_of_communication(error: BaseException) -> bool:
    """Whether an error may come from a rank that is gone."""
    text = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
