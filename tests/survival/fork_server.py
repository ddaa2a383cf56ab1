"""A process with everything imported that forks the ranks of a run: a launch takes one second instead of eight.

Reads a request per line, a JSON object, and answers each with a line:

    {"arguments": [...], "fault": {...} | null, "ranks": 2, "timeout": 60, "cwd": "...", "log": "..."}
    {"codes": [...], "ended": [seconds since the first rank ended, ...], "hung": false}

What rank N prints goes to `LOG.N`. A rank that a fault stops with SIGSTOP is killed once all others have ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


def warm(recipe: str) -> None:
    """Import what a run imports, and fill the caches of its checks; no thread may live on when ranks are forked."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.vit.modeling_vit  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import slimfit_ds.engine.engine
    import slimfit_ds.engine.initialize
    import slimfit_ds.engine.processes
    import slimfit_ds.report.schedule_plot
    import slimfit_ds.training.cli
    import slimfit_ds.training.run
    from slimfit_ds.training.checks import inspect
    from slimfit_ds.training.distributed import Ranks
    from slimfit_ds.training.recipe import read_recipe

    # Half of a run's time, and nothing that a fault could hit.
    slimfit_ds.report.schedule_plot.plot_schedule = lambda *_: None
    found = inspect(read_recipe(recipe, ["output_dir=nowhere"]), Ranks())
    found.model_config.to_dict()
    get_checkpoint_conversion_mapping("vit")
    threads = [Path(place, "comm").read_text().strip() for place in Path("/proc/self/task").iterdir()]
    # Arrow's allocator knows forks.
    assert set(threads[1:]) <= {"jemalloc_bg_thd"}, f"threads {threads} would be lost in a fork"


def serve(request: dict) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            run_rank(request, rank, port)
        pids.append(pid)
    return wait(pids, request)


def wait(pids: list[int], request: dict) -> dict:
    codes: list[int | None] = [None] * len(pids)
    times: list[float] = [0.0] * len(pids)
    stopped = (request.get("fault") or {}).get("rank") if "stop" in str(request.get("fault")) else None
    deadline = time.monotonic() + request["timeout"]
    hung = False
    while None in codes:
        for rank, pid in enumerate(pids):
            if codes[rank] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[rank], times[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
        waiting = [rank for rank, code in enumerate(codes) if code is None]
        late = time.monotonic() > deadline
        if late or waiting == [stopped]:
            hung = hung or (late and waiting != [stopped])
            for rank in waiting:
                os.kill(pids[rank], signal.SIGKILL)
        time.sleep(0.01)
    first = min(times)
    return {"codes": codes, "ended": [moment - first for moment in times], "hung": hung}


def run_rank(request: dict, rank: int, port: int) -> None:
    code = 1
    try:
        log = os.open(f"{request['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, descriptor)
        os.chdir(request["cwd"])
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        sys.argv = ["launch/train.py", *request["arguments"]]
        from faults import Events

        events = Events(request.get("fault"), rank)
        from slimfit_ds.training.cli import main

        code = main(request["arguments"])
        Path(f"{request['log']}.events.{rank}").write_text(json.dumps(events.names))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm(sys.argv[1])
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=replies, flush=True)
