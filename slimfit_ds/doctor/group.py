"""The ranks of a launcher together: who is there, with which versions, and whether an all-reduce gets through.

What each rank found travels through the rendezvous' key-value store, not through the collective that is being tested, so
that the report can name the ranks for which the collective fails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from slimfit_ds.doctor.findings import THREADS
from slimfit_ds.doctor.members import Member
from slimfit_ds.training.distributed import Ranks

__all__ = ["Meeting", "TooLate", "limited", "meet", "own_device"]

ELEMENTS = 2**18
"""float32 values of the trial all-reduce: 1 MiB."""


class TooLate(RuntimeError):
    """A call took longer than its limit, and goes on in a thread that nobody waits for."""


def limited(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of a call that may hang.

    Raises:
        TooLate: it takes longer than this.
    """
    box: dict[str, Any] = {}

    def run() -> None:
        try:
            box["result"] = call()
        except BaseException as error:  # handed to the caller
            box["error"] = error

    thread = threading.Thread(target=run, daemon=True, name=THREADS)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TooLate(f"no answer within {seconds:g} s")
    if "error" in box:
        raise box["error"]
    return box["result"]


@dataclass
class Meeting:
    """The store through which the ranks talk about the group.

    Args:
        ranks: this process among all.
        store: torch's key-value store.
        seconds: how long rank 0 waits for the others, and a collective may take.
    """

    ranks: Ranks
    store: Any
    seconds: float

    def all_reduce(self, backend: str, device: str) -> tuple[float | None, str]:
        """Sum a small tensor over all ranks.

        Returns:
            seconds, or None and the reason.
        """
        import torch

        world = self.ranks.world_size

        def reduce() -> float:
            torch.distributed.init_process_group(
                backend,
                store=torch.distributed.PrefixStore("trial", self.store),
                rank=self.ranks.rank,
                world_size=world,
                timeout=timedelta(seconds=self.seconds),
            )
            values = torch.full((ELEMENTS,), float(self.ranks.rank + 1), device=device)
            torch.distributed.all_reduce(values.clone())  # connections are made at the first one
            start = time.perf_counter()
            torch.distributed.all_reduce(values)
            total = values[-1].item()
            taken = time.perf_counter() - start
            if total != world * (world + 1) / 2:
                raise ArithmeticError(f"the sum is {total}, not {world * (world + 1) / 2}")
            return taken

        try:
            return limited(self.seconds, reduce), ""
        except Exception as error:
            return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"

    def tell(self, member: Member) -> None:
        self.store.set(f"member/{member.rank}", member.to_json())

    def collect(self) -> list[Member]:
        """Everything that arrives within the limit, in rank order."""
        members = []
        end = time.monotonic() + self.seconds
        for rank in range(self.ranks.world_size):
            left = max(0.2, end - time.monotonic())
            try:
                self.store.wait([f"member/{rank}"], timedelta(seconds=left))
                members.append(Member.from_json(self.store.get(f"member/{rank}").decode()))
            except Exception:
                continue  # named by `compare_members`
        return members

    def verdict(self, code: int | None) -> int:
        """Rank 0 gives the exit code, the others take it; rank 0 leaves last, as the store may be in its process."""
        others = self.ranks.world_size - 1
        if code is not None:
            self.store.set("verdict", str(code))
            end = time.monotonic() + 2
            while self.store.add("left", 0) < others and time.monotonic() < end:
                time.sleep(0.02)
            return code
        self.store.wait(["verdict"], timedelta(seconds=2 * self.seconds))
        taken = int(self.store.get("verdict"))
        self.store.add("left", 1)
        return taken


def own_device(ranks: Ranks, environment: Mapping[str, str]) -> tuple[str, str]:
    """Device and backend that a run would use on this rank, without the seconds that DeepSpeed's import takes."""
    import torch

    if torch.cuda.is_available() and environment.get("DS_ACCELERATOR", "cuda") == "cuda":
        return f"cuda:{ranks.local_rank}", "nccl"
    return "cpu", "gloo"


def meet(ranks: Ranks, seconds: float) -> Meeting:
    """Reach rank 0's store.

    Raises:
        Exception: torch's, if it cannot be reached within the limit.
    """
    import torch

    place = f"env://?rank={ranks.rank}&world_size={ranks.world_size}"

    def connect() -> Any:
        # The address stands in the environment, see `training.distributed.export`.
        found = torch.distributed.rendezvous(place, timeout=timedelta(seconds=seconds))
        return next(iter(found))[0]

    store = limited(seconds + 1, connect)
    return Meeting(ranks, torch.distributed.PrefixStore("doctor", store), seconds)
