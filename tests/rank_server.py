"""A process with everything imported that forks the ranks of a worker script: a launch takes one second instead of ten.

Reads a request per line, a JSON object, and answers each with a line:

    {"script": "/.../worker.py", "arguments": [...], "cwd": "/...", "ranks": 2, "timeout": 240, "grace": 2, "log": "/.../log"}
    {"codes": [0, 0], "ended": [0.0, 0.1], "hung": false}

What rank N prints goes to `LOG.N`. `grace` seconds after a rank has failed the others are killed, as torchrun does; `ended` counts
from the end of the first rank. A rank that stands still (SIGSTOP) is killed once all others have ended.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path


def warm() -> None:
    """Import what workers import; no thread may live on when ranks are forked."""
    import datasets  # noqa: F401
    import deepspeed
    import sklearn.datasets  # noqa: F401
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama
    import transformers.models.vit.modeling_vit
    import transformers.trainer  # noqa: F401

    import slimfit_ds.engine.engine
    import slimfit_ds.integrations.output_folder
    import slimfit_ds.integrations.survival
    import slimfit_ds.integrations.trainer_callback
    import slimfit_ds.tasks.models
    import slimfit_ds.tasks.setup  # noqa: F401

    # Serves inference only and takes half a minute to build.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    threads = [Path(place, "comm").read_text().strip() for place in Path("/proc/self/task").iterdir()]
    # Arrow's allocator knows forks.
    assert set(threads[1:]) <= {"jemalloc_bg_thd"}, f"threads {threads} would be lost in a fork"


def serve(request: dict) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids: list[int] = []
    for rank in range(request["ranks"]):
        pid = os.fork()
        if pid == 0:
            run_rank(request, rank, port)
        pids.append(pid)
    codes: list[int | None] = [None] * len(pids)
    times = [0.0] * len(pids)
    deadline = time.monotonic() + request["timeout"]
    hung = False
    while None in codes:
        for rank, pid in enumerate(pids):
            if codes[rank] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[rank], times[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
                    if codes[rank]:
                        deadline = min(deadline, time.monotonic() + request["grace"])
        waiting = [pid for rank, pid in enumerate(pids) if codes[rank] is None]
        still = [
            pid
            for pid in waiting
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        ]
        late = time.monotonic() > deadline
        hung = hung or (late and bool(waiting))
        for pid in waiting if late else still if still == waiting else ():
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return {"codes": codes, "ended": [moment - min(times) for moment in times], "hung": hung}


def run_rank(request: dict, rank: int, port: int) -> None:
    code = 1
    try:
        log = os.open(f"{request['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
            os.dup2(source, descriptor)
        os.chdir(request["cwd"])
        sys.path.insert(0, str(Path(request["script"]).parent))
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["ranks"]),
            LOCAL_WORLD_SIZE=str(request["ranks"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        sys.argv = [request["script"], *request["arguments"]]
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), file=replies, flush=True)
