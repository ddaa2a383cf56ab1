"""The end of a process that has talked over gloo."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from slimfit_ds.engine import processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc on this system")


def _work(rounds: int, name: str) -> threading.Thread:
    """A thread of the system's name `name` that computes without the interpreter's lock; a million rounds take half a second."""
    begun = threading.Event()

    def run() -> None:
        (Path("/proc/self/task") / str(threading.get_native_id()) / "comm").write_text(name)
        begun.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    return thread


def test_the_end_waits_for_a_thread_of_gloo_that_runs() -> None:
    thread = _work(1_000_000, "pt_gloo_runloop")
    processes._await_gloo()
    assert not thread.is_alive()


def test_it_waits_for_no_other_thread_and_not_for_ever() -> None:
    thread = _work(4_000_000, "another")
    processes._await_gloo()
    assert thread.is_alive()
    (Path("/proc/self/task") / str(thread.native_id) / "comm").write_text("pt_gloo_runloop")
    processes._await_gloo(limit=0.05)
    assert thread.is_alive()
    thread.join()


def test_an_engine_and_a_launched_run_end_that_way() -> None:
    code = (
        "import atexit, slimfit_ds\n"
        "from slimfit_ds.engine import processes\n"
        "seen = []\n"
        "atexit.register = seen.append\n"
        "try: slimfit_ds.initialize(config={}, model=None)\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(processes._await_gloo in seen, len(seen))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    # Nothing else: what registers itself then (torch._dynamo does) has been imported for nothing.
    assert "True 1" in done.stdout, done.stdout + done.stderr[-2000:]
