"""What the benchmarks share: results as CSV, steps in turns, fresh processes, ranks, tables of documents.

A study is one CSV in `benchmarks/results/`: one measurement per row, flat named columns, each with the commit, machine,
torch version and command it was made by. A program adds the rows that its CSV lacks, so an interrupted run goes on where
it stopped; delete a row to measure it again. `python benchmarks/tables.py` renders the CSVs into the documents.
"""

from __future__ import annotations

import csv
import fcntl
import json
import math
import multiprocessing
import os
import platform
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "DATA",
    "RESULTS",
    "ROOT",
    "Failed",
    "Process",
    "Study",
    "between_marks",
    "in_turns",
    "launch_ranks",
    "machine",
    "markdown",
    "quartiles",
]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DATA = Path(os.environ.get("SLIMFIT_DATA", ROOT.parent / "shared" / "data"))
# Columns whose values are never numbers, although a commit such as 12e4567 looks like one.
_TEXT = {"commit", "command", "torch", "hardware"}


def machine(device: str = "cpu") -> dict[str, str]:
    """Return `commit`, `hardware`, `torch` and `command` of this run, for a row of a study."""
    import torch

    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
        hardware = f"{name or platform.machine()}, {os.cpu_count()} cores"
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    return {
        "commit": _commit(),
        "hardware": hardware,
        "torch": torch.__version__,
        "command": shlex.join(["python", str(script), *sys.argv[1:]]),
    }


@cache
def _commit() -> str:
    described = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(described, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"


class Study:
    """The rows of one CSV.

    Args:
        name: of the file in `benchmarks/results/`, without its ending; or a path that ends in `.csv`.
        keys: the columns that tell measurements apart.
    """

    def __init__(self, name: str | Path, keys: Sequence[str]):
        self.path = Path(name) if str(name).endswith(".csv") else RESULTS / f"{name}.csv"
        self.keys = tuple(keys)

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """Return the rows with these values; empty cells are None, numbers are numbers."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            found = [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]
        return [row for row in found if all(row.get(key) == value for key, value in wanted.items())]

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether there is a row with these keys."""
        wanted = [_value(key, _text(row.get(key))) for key in self.keys]
        return any([known.get(key) for key in self.keys] == wanted for known in self.rows())

    def add(self, *rows: Mapping[str, Any]) -> None:
        """Append rows; columns that are new are added to the others with empty cells. Several processes may add."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            reader = csv.DictReader(file)
            known, columns = list(reader), list(reader.fieldnames or [])
            new = list(dict.fromkeys(key for row in rows for key in row if key not in columns))
            if new:
                file.truncate(0)
            writer = csv.DictWriter(file, [*columns, *new], lineterminator="\n")
            if new:
                writer.writeheader()
                writer.writerows(known)
            file.seek(0, os.SEEK_END)
            writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _value(key: str, text: str | None) -> Any:
    if not text:
        return None
    if key not in _TEXT:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
    return text


def in_turns(
    steps: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 2,
    seconds: float = math.inf,
    synchronize: Callable[[], Any] = lambda: None,
    least: int = 1,
) -> dict[str, dict[str, list[float]]]:
    """Time steps that take turns, so that load and drift of the machine move all of them and leave their ratios.

    Who begins changes from round to round.

    Args:
        steps: name -> one step.
        rounds: timed steps of each.
        warm_up: untimed steps before.
        seconds: no new round starts after this time, but `least` are done.
        synchronize: waits for the device.

    Returns:
        name -> `seconds` by the clock and `cpu_seconds` of all threads of this process, one value per round.
    """
    times: dict[str, dict[str, list[float]]] = {n: {"seconds": [], "cpu_seconds": []} for n in steps}
    started = time.monotonic()
    for number in range(warm_up + rounds):
        if number >= warm_up + least and time.monotonic() - started > seconds:
            break
        for name in list(steps) if number % 2 == 0 else list(steps)[::-1]:
            begin, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            synchronize()
            if number >= warm_up:
                times[name]["seconds"].append(time.perf_counter() - begin)
                times[name]["cpu_seconds"].append(time.process_time() - cpu)
    return times


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


class Failed(RuntimeError):
    """A measurement that could not be made.

    Args:
        status: `unavailable`, `out of memory`, `failed` or `timeout`.
        reason: in words.
    """

    def __init__(self, status: str, reason: str):
        super().__init__(status, reason)
        self.status, self.reason = status, reason

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"


# glibc keeps what is freed, as a caching allocator does; otherwise it depends on the heap's history whether a process
# gives pages back in each step and faults them in again, a tenth of a step on a CPU.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class Process:
    """An object that lives in a fresh process.

    Args:
        make: builds the object, in the new process; a function of a module.
        arguments: of `make`.
        seconds: time limit of all calls together.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any, seconds: float = math.inf):
        context = multiprocessing.get_context("spawn")
        self._deadline = time.monotonic() + seconds
        self._log = tempfile.NamedTemporaryFile("r", suffix=".log")  # noqa: SIM115 - closed in `end`
        self._pipe, theirs = context.Pipe()
        before = {key: os.environ.get(key) for key in _MALLOC}
        os.environ.update({key: value for key, value in _MALLOC.items() if before[key] is None})
        self._process = context.Process(target=_serve, args=(theirs, self._log.name, make, arguments))
        self._process.start()
        for key, value in before.items():
            if value is None:
                del os.environ[key]
        theirs.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the object and return its result.

        Raises:
            Failed: it failed; or the process died, or its time is over, and has been ended.
        """
        try:
            self._pipe.send((method, arguments, options))
            if not self._pipe.poll(max(0.0, min(self._deadline - time.monotonic(), 1e6))):
                self.end()
                raise Failed("timeout", "took longer than it may")
            status, answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code, said = self._process.exitcode, self._log.read()[-400:]
            self.end()
            # A process that the kernel kills for memory leaves no message of its own.
            raise Failed("out of memory" if code == -9 else "failed", f"exit code {code}: {said}") from None
        if status != "ok":
            raise Failed(status, answer)
        return answer

    def end(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._pipe.close()
        self._log.close()


def _serve(pipe: Any, log: str, make: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Carry out calls in the new process until the pipe closes."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    made = None
    while True:
        try:
            method, given, options = pipe.recv()
        except EOFError:
            # Engines and compiled kernels leave threads behind.
            os._exit(0)
        try:
            made = make(*arguments) if made is None else made
            pipe.send(("ok", getattr(made, method)(*given, **options)))
        except Failed as error:
            pipe.send((error.status, error.reason))
        except Exception as error:
            traceback.print_exc()
            first = next((text for text in str(error).splitlines() if text.strip()), "")
            memory = "OutOfMemory" in type(error).__name__
            pipe.send(("out of memory" if memory else "failed", f"{type(error).__name__}: {first}"[:300]))


def launch_ranks(ranks: int, script: str, *arguments: Any, seconds: float = 1800) -> dict[str, Any]:
    """Run a script on gloo ranks with one thread each and return the JSON of its line that begins with `RESULT`.

    Raises:
        Failed: with the end of what it printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += ["--master_port", str(free_port()), script, *map(str, arguments)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise Failed("failed", f"{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def markdown(titles: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> str:
    """Return a Markdown table; the first `left` columns are aligned to the left, the others to the right."""
    align = ["---" if place < left else "---:" for place in range(len(titles))]
    lines = [" | ".join(map(str, titles)), None, *(" | ".join(map(str, row)) for row in rows)]
    return "\n".join("|" + "|".join(align) + "|" if line is None else f"| {line} |" for line in lines)


def between_marks(text: str, name: str, block: str | None = None) -> str:
    """Return what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`, or the text with it replaced.

    Raises:
        ValueError: the marks are not there, once each and in this order.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    found = re.findall(f"{re.escape(begin)}(.*?){re.escape(end)}", text, re.DOTALL)
    if len(found) != 1 or text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"wants {begin} and {end} once each, in this order")
    if block is None:
        return found[0].strip()
    return text.replace(f"{begin}{found[0]}{end}", f"{begin}\n\n{block.strip()}\n\n{end}")
