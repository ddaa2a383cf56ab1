"""Runs a recipe by one method after the other, each in its own processes under DeepSpeed's launcher."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from slimfit_ds.comparison.methods import Method
from slimfit_ds.comparison.result import Outcome, gpus_needed
from slimfit_ds.comparison.worker import MEASURES
from slimfit_ds.planner.strategies import TUNED_BUCKET
from slimfit_ds.training.deepspeed_config import load_base
from slimfit_ds.training.recipe import Recipe, read_recipe

__all__ = ["Comparison", "compare"]

_OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        config: the recipe.
        methods: how it is run.
        output: folder of everything that is written.
        ranks: processes of each run.
        overrides: `key=value` laid over the recipe and the method.
        warmup: first steps that do not count for the time.
        tracked: last steps whose memory is tracked.
        gpu_memory: label -> bytes of GPUs to count for each method.
        timeout: seconds for each method.
    """

    config: str
    methods: Sequence[Method]
    output: Path
    ranks: int = 2
    overrides: Sequence[str] = ()
    warmup: int = 2
    tracked: int = 3
    gpu_memory: tuple[tuple[str, int], ...] = ()
    timeout: float = 3600.0


def compare(what: Comparison, progress: Callable[[str], None] = lambda text: None) -> list[Outcome]:
    """Run every method; one that fails becomes a row that says so.

    Args:
        what: recipe, methods and sizes.
        progress: told what happens next.

    Returns:
        An outcome for each method, in order.
    """
    outcomes = []
    for number, method in enumerate(what.methods, 1):
        progress(f"[{number}/{len(what.methods)}] {method.label}")
        outcome = _run(what, method)
        progress(f"      {outcome.status}" + (f": {outcome.error}" if outcome.error else ""))
        outcomes.append(outcome)
    return outcomes


def _command(what: Comparison, method: Method, run: Path, failure: Path) -> list[str]:
    overrides = [
        *([_tuned_deepspeed(what)] if method.tuned else []),
        *method.overrides,
        *what.overrides,
        f"output_dir={json.dumps(str(run))}",
        "resume=none",
        "save_model=false",
    ]
    return [
        *(str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(what.ranks)),
        *("--master_port", str(_free_port()), "--module", "slimfit_ds.comparison.worker"),
        *("--config", str(what.config), "--warmup", str(what.warmup), "--tracked", str(what.tracked)),
        *("--failure", str(failure)),
        *overrides,
    ]


def _tuned_deepspeed(what: Comparison) -> str:
    """The recipe's own DeepSpeed JSON with small buckets, as an override."""
    draft = read_recipe(what.config, what.overrides)
    base = load_base(draft.recipe, draft.folder)
    zero = dict(base.get("zero_optimization", {}))
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        stated = zero.get(key)
        zero[key] = min(stated, TUNED_BUCKET) if isinstance(stated, int | float) else TUNED_BUCKET
    return "deepspeed=" + json.dumps({**base, "zero_optimization": zero})


def _run(what: Comparison, method: Method) -> Outcome:
    folder = what.output / method.name
    folder.mkdir(parents=True, exist_ok=True)
    run, failure, log = folder / "run", folder / "failure.json", folder / "log.txt"
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // what.ranks)))
    # The launcher finds ninja and the interpreter's tools there.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    with log.open("w") as sink:
        process = subprocess.Popen(
            _command(what, method, run, failure),
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(what.timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            text = f"took more than {what.timeout:.0f} s; see {log}"
            return Outcome(method.name, method.label, status="timeout", error=text)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code != 0 or not (run / MEASURES).is_file():
        return _failed(method, code, failure, log)
    return _read(what, method, run)


def _failed(method: Method, code: int, failure: Path, log: Path) -> Outcome:
    if failure.is_file():
        reason = json.loads(failure.read_text())
        first = next((line for line in reason["message"].splitlines() if line.strip()), "")
        error = f"{reason['type']}: {first}"
        status = "out of memory" if reason["type"] in _OUT_OF_MEMORY else "failed"
    else:
        # A process that the kernel kills for memory leaves no message of its own.
        status = "out of memory" if "exits with return code = -9" in log.read_text() else "failed"
        error = f"exit code {code}"
    return Outcome(method.name, method.label, status=status, error=f"{error}; see {log}")


def _read(what: Comparison, method: Method, run: Path) -> Outcome:
    metrics = json.loads((run / "metrics.json").read_text())
    measures = json.loads((run / MEASURES).read_text())
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    memory, highest = measures["memory"], measures["memory_highest"]
    stage = _stage(method, run)
    return Outcome(
        name=method.name,
        label=method.label,
        metrics=metrics["metrics"],
        # The mean over a few steps: the loss of one batch says little.
        loss=_mean([line["loss"] for line in history[-5:]]),
        steps=metrics["steps"],
        seconds_per_step=measures["seconds_per_step"],
        bytes_per_step=measures["bytes_per_step"],
        parameters=measures["parameters"],
        peak=memory["peak"],
        at_peak=memory["at_peak"],
        peak_phase=memory["peak_phase"],
        peak_module=memory["peak_module"],
        states=highest["parameters"] + highest["gradients"] + highest["optimizer"],
        states_host=highest["optimizer_host"],
        saved_dynamic=highest["saved_activations_dynamic"],
        saved_static=highest["saved_activations_static"],
        peak_resident=metrics["peak_bytes"],
        gpus={
            label: gpus_needed(memory["at_peak"], what.ranks, stage, size) for label, size in what.gpu_memory
        },
        surroundings={key: metrics[key] for key in ("world_size", "dtype", "seed", "versions", "hardware")},
        output_dir=str(run),
    )


def _stage(method: Method, run: Path) -> int:
    if method.stage is not None:
        return method.stage
    recipe = Recipe.model_validate(yaml.safe_load((run / "recipe.yaml").read_text()))
    zero: Any = load_base(recipe, None).get("zero_optimization", {})
    return int(zero.get("stage", 0))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
