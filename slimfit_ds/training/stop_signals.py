"""Requests to stop: SIGTERM, SIGINT, SIGUSR1, or a launcher that is gone.

A request is only noted; all ranks agree on it in the all-reduce that every step has anyway. Signals are read by a
thread, because Python's own handlers wait while the main thread is inside a collective.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from slimfit_ds.training.launcher import Launcher

__all__ = ["SIGNALS", "StopSignals", "ignore_stop_signals"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What a scheduler, a keyboard and Slurm's `--signal` send."""

ECHO = 1.0
"""Seconds in which a second signal is the first one again: terminals and launchers both deliver it."""

LOOK = 1.0
"""Seconds between two looks at the launcher."""


class StopSignals:
    """Notes requests to stop from `start` to `stop`.

    Attributes:
        reason: who asked, in words; None: nobody has.

    Args:
        launcher: its end is a request, too.
    """

    def __init__(self, launcher: Launcher):
        self.reason: str | None = None
        self._launcher = launcher
        self._previous: dict[signal.Signals, Any] = {}
        self._running = False

    def start(self) -> None:
        """Take the signals over; outside the main thread (a notebook's worker) this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _noted) for number in SIGNALS}
        self._running = True
        self._thread = threading.Thread(target=self._watch, name="slimfit-signals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Give the signals back to whoever had them."""
        if not self._running:
            return
        self._running = False
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        first = 0.0
        while self._running:
            ready, _, _ = select.select([self._read], [], [], LOOK)
            numbers = os.read(self._read, 64) if ready else b""
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if self.reason is None:
                    first = time.monotonic()
                    self.reason = signal.Signals(number).name
                elif time.monotonic() - first > ECHO:
                    print(f"second {signal.Signals(number).name}: ends at once, unsaved", file=sys.stderr)
                    sys.stderr.flush()
                    os._exit(128 + number)
            if self.reason is None and (lost := self._launcher.lost()):
                first = time.monotonic()
                self.reason = f"its launcher ({lost}) is gone"


def ignore_stop_signals(*_: Any) -> None:
    """For processes that prepare batches: they end with their rank, not before it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _noted(number: int, frame: FrameType | None) -> None:
    """The thread has read the signal already."""
