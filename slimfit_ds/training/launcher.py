"""The process that started this rank: its command line, and whether it is still there.

`torchrun` hands a SIGTERM on to its ranks. `deepspeed` is two processes: the outer one dies of a SIGTERM and leaves
the inner one and all ranks running, unless these notice.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

__all__ = ["Launcher", "find_launcher"]


_TORCHRUN = frozenset({"torchrun", "accelerate", "torch.distributed.run"})
_DEEPSPEED = frozenset({"deepspeed", "ds", "deepspeed.launcher.runner"})
_DEEPSPEED_INNER = frozenset({"deepspeed.launcher.launch"})
_MPIRUN = frozenset({"mpirun", "mpiexec", "orterun", "prterun"})


def _is_one_of(names: frozenset[str], command: Sequence[str]) -> bool:
    """Whether a command line runs one of these programs or `-m` modules: `python -u -m NAME`, `/bin/NAME`."""
    return any(os.path.basename(argument) in names for argument in command[:4])


@dataclass(frozen=True)
class Launcher:
    """What started this rank.

    Args:
        processes: whose end means that nobody looks after the ranks any more; the outermost last.
        command: the command line to start all ranks again; None: only this rank's own is known.
    """

    processes: tuple[psutil.Process, ...] = ()
    command: tuple[str, ...] | None = None

    def lost(self) -> str | None:
        """Which launcher process is gone, or None."""
        for process in self.processes:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return f"process {process.pid}"
        return None

    def again(self, overrides: Sequence[str] = ()) -> str:
        """The shell command that starts the same run again, with these overrides behind it."""
        command = self.command or (sys.executable, *sys.argv)
        return shlex.join([*command, *(text for text in overrides if text not in command)])


def find_launcher() -> Launcher:
    """Look at the parents of this process."""
    try:
        parents = psutil.Process().parents()[:2]
        lines = [parent.cmdline() for parent in parents]
    except psutil.Error:
        return Launcher()
    if not lines:
        return Launcher()
    if _is_one_of(_DEEPSPEED_INNER, lines[0]):
        if len(lines) > 1 and _is_one_of(_DEEPSPEED, lines[1]):
            return Launcher((parents[0], parents[1]), tuple(lines[1]))
        return Launcher((parents[0],))
    if _is_one_of(_TORCHRUN | _MPIRUN, lines[0]):
        return Launcher((parents[0],), tuple(lines[0]))
    return Launcher()
