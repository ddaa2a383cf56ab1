"""Start the process group the way DeepSpeed wants it, without its traps."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slimfit_ds.errors import ConfigError

__all__ = ["end_after_gloo", "skip_shm_build", "start_processes"]

_GLOO_THREADS = "(pt_gloo_runloop)"
_QUIET_LOOKS = 5


def start_processes() -> torch.device:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Returns:
        the device of this rank.

    Raises:
        ConfigError: the port is in use.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    device = accelerator.device_name(int(os.environ["LOCAL_RANK"]))
    if accelerator.device_name() != "cpu":
        accelerator.set_device(int(os.environ["LOCAL_RANK"]))
    undo = skip_shm_build()
    try:
        deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ.get("MASTER_PORT")
        raise ConfigError(
            [
                f"MASTER_PORT: another process of this machine listens on {port}; choose a free port: "
                "deepspeed --master_port, torchrun --master-port, or the variable MASTER_PORT"
            ]
        ) from None
    finally:
        undo()
    end_after_gloo()
    torch.distributed.barrier()
    return torch.device("cpu" if accelerator.device_name() == "cpu" else device)


def skip_shm_build() -> Callable[[], None]:
    """Keep `init_distributed` from building DeepSpeed's shared-memory collectives.

    They serve inference only, take half a minute to build, and a killed build blocks the next run for ever.

    Returns:
        what undoes it.
    """
    import deepspeed

    operators, name = deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm"
    before = operators.get(name, False)
    operators[name] = False
    return lambda: operators.__setitem__(name, before)


@functools.cache
def end_after_gloo() -> None:
    """Let this process end only when gloo's threads have nothing left to do.

    DeepSpeed's engine, and under ZeRO 3 each parameter, holds its process groups beyond `destroy_process_group()`, so their
    threads live on. One that still has a collective's tensors, because a busy machine has not let it put them down,
    asks for the interpreter's lock; when the interpreter is ending by then, the thread is ended in the middle of C++ and
    takes the process with it: "terminate called without an active exception", SIGABRT, after a whole and good run.
    """
    atexit.register(_await_gloo)


def _await_gloo(limit: float = 10.0) -> None:
    """Sleep, without the interpreter's lock, until no thread of gloo has run for some looks in a row, `limit` seconds at most."""
    end, quiet = time.monotonic() + limit, 0
    while quiet < _QUIET_LOOKS and time.monotonic() < end:
        time.sleep(0.001)
        quiet = 0 if _gloo_runs() else quiet + 1


def _gloo_runs() -> bool:
    """Whether the system says so; not where it has no /proc."""
    for stat in Path("/proc/self/task").glob("*/stat"):
        try:
            _, name, state = stat.read_text().partition(_GLOO_THREADS)
        except OSError:
            continue
        if name and state.split()[0] != "S":
            return True
    return False
