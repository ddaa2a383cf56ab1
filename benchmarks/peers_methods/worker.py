"""A process that does what it is told, one line of JSON at a time; and the side that tells it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Gone", "Worker", "serve"]


_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""glibc keeps what is freed, as a caching allocator does: otherwise it depends on luck with the heap's layout whether a
process gives pages back in each step and faults them in again, a tenth of a step on a CPU."""


class Gone(RuntimeError):
    """A worker answered that it cannot, died, or took too long.

    Args:
        status: `unavailable`, `out of memory`, `failed` or `timeout`.
        reason: in words.
    """

    def __init__(self, status: str, reason: str):
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


class Worker:
    """A process and its answers. It starts to import at once and touches no device before it is told to.

    Args:
        command: of the process; `--answers FD` is added.
        log: file for whatever it prints.
        folder: working directory.
    """

    def __init__(self, command: Sequence[str], log: Path, folder: Path):
        reading, writing = os.pipe()
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [*command, "--answers", str(writing)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                env=_MALLOC | os.environ | {"PYTHONUNBUFFERED": "1"},
                cwd=folder,
                pass_fds=(writing,),
            )
        os.close(writing)
        self._answers = reading
        self._pending = b""
        self.log = log
        self.deadline = float("inf")

    def ask(self, order: str, **options: Any) -> dict[str, Any]:
        """Have an order carried out.

        Raises:
            Gone: it could not be, or not before `deadline` (of `time.monotonic`); the process is ended.
        """
        if self._answers < 0:
            raise Gone("failed", "the process has been ended")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([order, options]) + "\n")
            self._process.stdin.flush()
            answer = self._answer()
        except BrokenPipeError:
            answer = self._died()
        except Gone:
            self.end()
            raise
        if "status" in answer:
            self.end()
            raise Gone(answer["status"], answer["error"])
        return answer

    def turn(self, steps: int) -> Mapping[str, Sequence[float]]:
        """Time some steps; see `Bench.turn`."""
        return self.ask("turn", steps=steps)

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            # What was not flushed has no reader any more.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        if self._answers >= 0:
            os.close(self._answers)
            self._answers = -1

    def _answer(self) -> dict[str, Any]:
        while b"\n" not in self._pending:
            left = self.deadline - time.monotonic()
            if left <= 0:
                raise Gone("timeout", "took longer than it may")
            ready, _, _ = select.select([self._answers], [], [], min(left, 3600.0))
            if ready:
                read = os.read(self._answers, 1 << 16)
                if not read:
                    return self._died()
                self._pending += read
        line, self._pending = self._pending.split(b"\n", 1)
        return json.loads(line)

    def _died(self) -> dict[str, Any]:
        code = self._process.wait()
        # A process that the kernel kills for memory leaves no message of its own.
        status = "out of memory" if code == -9 else "failed"
        return {"status": status, "error": f"exit code {code}; see {self.log.name}"}


def serve(answers: int, actions: Mapping[str, Callable[..., Mapping[str, Any]]]) -> None:
    """The worker's side: carry out the orders of stdin until it closes, one answer to each.

    Args:
        answers: file descriptor that answers are written to.
        actions: order -> what does it; may raise `Unavailable`.
    """
    import torch

    from peers_methods.building import Unavailable

    # A compiler or a loader that a method starts must not hold it open.
    os.set_inheritable(answers, False)
    with os.fdopen(answers, "w") as out:
        for line in sys.stdin:
            order, options = json.loads(line)
            try:
                answer = dict(actions[order](**options))
            except Unavailable as error:
                answer = {"status": "unavailable", "error": str(error)}
            except torch.OutOfMemoryError as error:
                answer = {"status": "out of memory", "error": str(error).split(". ")[0]}
            except Exception as error:
                traceback.print_exc()
                first = next((text for text in str(error).splitlines() if text.strip()), "")
                answer = {"status": "failed", "error": f"{type(error).__name__}: {first}"[:300]}
            out.write(json.dumps(answer) + "\n")
            out.flush()
