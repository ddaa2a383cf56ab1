"""Program: run training steps and track them, one JSON job per line on stdin, one JSON result per line out.

The tensors are fake, so that nothing of the model is allocated; with `--real` they are real, for measurements.

A process of its own because a fake process group has one size for life, because DeepSpeed keeps groups and the
codecs keep tables that must not be fake in the caller, and because a failed job may then not take the caller along.

    echo '{"workload": {...}, "strategy": {...}}' | python -m slimfit_ds.planner.simulate --world-size 8
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Read jobs until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--real", action="store_true", help="real tensors on the CPU, one rank")
    arguments = parser.parse_args(argv)
    os.environ["DS_ACCELERATOR"] = "cpu"
    # What libraries print must not end up among the results.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if arguments.real:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        os.environ["MASTER_PORT"] = str(_free_port())
    _prepare()
    for number, line in enumerate(sys.stdin):
        results.write(json.dumps(_run(json.loads(line), arguments.world_size, arguments.real)) + "\n")
        results.flush()
        if number == 0:
            # Each step collects garbage first, which need not go through all that the first one imported.
            gc.collect()
            gc.freeze()
    # Native libraries with hooks at exit meet fake tensors there; everything has been written.
    os._exit(0)


def _prepare() -> None:
    """Import what jobs need, outside the fake world, and take the checks out that compare ranks' values."""
    warnings.filterwarnings("ignore")
    from deepspeed.runtime.zero import partitioned_param_coordinator

    from slimfit_ds.activations.codecs import registry
    from slimfit_ds.engine.processes import skip_shm_build

    logging.disable(logging.ERROR)
    # For the life of this process.
    skip_shm_build()
    # Compares lists of integers across ranks, and fake tensors carry none.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda *_: None
    registry._FACTORIES.update({name: _outside(made) for name, made in registry._FACTORIES.items()})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _run(job: dict[str, Any], world_size: int, real: bool) -> dict[str, Any]:
    from slimfit_ds.planner.fake_world import FakeWorld
    from slimfit_ds.planner.step import inspect_model, track_step
    from slimfit_ds.planner.strategy import Strategy
    from slimfit_ds.planner.workload import Workload

    started = time.perf_counter()
    try:
        workload = Workload(**job["workload"])
        if "strategy" not in job:
            with FakeWorld(world_size):
                return inspect_model(workload)
        strategy = Strategy(**job["strategy"])
        with nullcontext() if real else FakeWorld(world_size):
            target = "cpu" if real else job["target"]
            report, facts = track_step(workload, strategy, world_size, job.get("active"), target)
    except Exception as error:
        if os.environ.get("SLIMFIT_DEBUG"):
            raise
        text = next((line for line in str(error).splitlines() if line.strip()), "")
        return {"error": f"{type(error).__name__}: {text}"[:500], "seconds": time.perf_counter() - started}
    return {"report": report.to_dict(), **facts, "seconds": time.perf_counter() - started}


def _outside(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Codecs compute and check their tables when they are made, which needs real numbers."""

    def made(**options: Any) -> Any:
        with _disable_current_modes():
            return factory(**options)

    return made


if __name__ == "__main__":
    sys.exit(main())
