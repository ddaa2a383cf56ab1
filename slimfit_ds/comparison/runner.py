"""Runs one recipe by one strategy after the other: `slimfit-ds train` under DeepSpeed's launcher, its steps measured."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimfit_ds.comparison.result import Outcome, gpus_needed
from slimfit_ds.errors import ConfigError
from slimfit_ds.integrations.ranks import free_port
from slimfit_ds.planner.strategies import Strategy
from slimfit_ds.tasks.recipe import read_recipe

__all__ = ["Comparison", "compare", "overrides_of"]


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Args:
        config: the recipe.
        strategies: how it is run.
        output: folder of everything that is written.
        ranks: processes of each run.
        overrides: `key=value` laid over the recipe, for every strategy.
        warmup: first steps that do not count for the time.
        tracked: last steps whose memory is tracked.
        gpu_memory: label -> bytes of GPUs to count for each strategy.
        timeout: seconds for each strategy.
    """

    config: str
    strategies: Sequence[Strategy]
    output: Path
    ranks: int = 2
    overrides: Sequence[str] = ()
    warmup: int = 2
    tracked: int = 3
    gpu_memory: tuple[tuple[str, int], ...] = ()
    timeout: float = 3600.0


def compare(what: Comparison, progress: Callable[[str], None] = lambda text: None) -> list[Outcome]:
    """Run every strategy; one that fails becomes a row that says so.

    Args:
        what: recipe, strategies and sizes.
        progress: told what happens next.

    Returns:
        An outcome for each strategy, in order.

    Raises:
        ConfigError: the recipe cannot be read.
    """
    plans = [overrides_of(strategy, what.config, what.overrides) for strategy in what.strategies]
    outcomes = []
    for number, (strategy, (overrides, stage)) in enumerate(zip(what.strategies, plans, strict=True), 1):
        progress(f"[{number}/{len(plans)}] {strategy.note or strategy.name}")
        outcome = _run(what, strategy, overrides, stage)
        progress(f"      {outcome.status}" + (f": {outcome.error}" if outcome.error else ""))
        outcomes.append(outcome)
    return outcomes


def overrides_of(strategy: Strategy, config: str, own: Sequence[str] = ()) -> tuple[list[str], int]:
    """Return what turns a recipe into a strategy, as `key=value` for `slimfit-ds train`, and the ZeRO stage of that.

    Buckets are small unless the strategy says otherwise: DeepSpeed's default is a gigabyte for any model, and a
    comparison against that says little.

    Args:
        strategy: how to train.
        config: the recipe.
        own: the user's overrides; they come first, so a strategy stays what it is.

    Raises:
        ConfigError: the recipe or its DeepSpeed JSON cannot be read.
    """
    recipe, _ = read_recipe(["--config", config, *own])
    base = _load(recipe.deepspeed)
    zero = base.get("zero_optimization")
    if strategy.own_zero or zero is None:
        zero = strategy.zero_block()
    elif strategy.bucket is not None:
        zero = dict(zero)
        for key in ("reduce_bucket_size", "allgather_bucket_size"):
            stated = zero.get(key)
            zero[key] = min(stated, strategy.bucket) if isinstance(stated, int | float) else strategy.bucket
    words = [*own, "deepspeed=" + json.dumps({**base, "zero_optimization": zero})]
    if strategy.slimfit is None:
        words.append("slimfit=null")
    elif not strategy.slimfit and recipe.slimfit is None and "slimfit" not in base:
        words.append("slimfit={}")
    for block, fields in (strategy.slimfit or {}).items():
        # Activations are one choice (a recipe may name a preset and overrides of it); of other blocks the rest stays.
        words += (
            [f"slimfit.activations={json.dumps(fields)}"]
            if block == "activations"
            else [f"slimfit.{block}.{key}={json.dumps(value)}" for key, value in fields.items()]
        )
    if strategy.gradient_checkpointing:
        words.append("gradient_checkpointing=true")
    if strategy.lr_factor != 1:
        rate = recipe.arguments.get("learning_rate", 5e-5)
        words.append(f"learning_rate={strategy.lr_factor * float(rate):g}")
    if strategy.lora is not None:
        words.append(f"lora={{r: {strategy.lora}}}")
    # Nobody goes on from a checkpoint of a comparison; only the best one of a run is needed, where a recipe wants that.
    if not recipe.arguments.get("load_best_model_at_end") and "save_steps" not in recipe.arguments:
        words.append("save_strategy=no")
    return words, int(zero.get("stage", 0))


def _load(deepspeed: Mapping[str, Any] | str | None) -> dict[str, Any]:
    if not isinstance(deepspeed, str):
        return dict(deepspeed or {})
    try:
        return dict(json.loads(Path(deepspeed).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError([f"deepspeed: cannot read {deepspeed!r} as a JSON object ({error})"]) from None


def _run(what: Comparison, strategy: Strategy, overrides: list[str], stage: int) -> Outcome:
    folder = what.output / strategy.name
    folder.mkdir(parents=True, exist_ok=True)
    run, log = folder / "run", folder / "log.txt"
    command = [
        *(str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(what.ranks)),
        *("--master_port", str(free_port()), "--no_local_rank", "--module", "slimfit_ds.train"),
        *("--config", str(what.config), *overrides, f"output_dir={json.dumps(str(run))}", "export=false"),
        f"measure={{warmup: {what.warmup}, tracked: {what.tracked}}}",
    ]
    with log.open("w") as sink:
        process = subprocess.Popen(
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=_environment(what.ranks),
            start_new_session=True,
        )
        try:
            code = process.wait(what.timeout)
        except subprocess.TimeoutExpired:
            text = f"took more than {what.timeout:.0f} s; see {log}"
            return Outcome(strategy.name, _label(strategy), status="timeout", error=text)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if code != 0 or not (run / "measures.json").is_file():
        return _failed(strategy, code, log)
    return _read(what, strategy, run, stage)


def _label(strategy: Strategy) -> str:
    return strategy.note or strategy.name


def _environment(ranks: int) -> dict[str, str]:
    import torch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment |= {"DS_ACCELERATOR": "cpu"}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # The launcher finds ninja and the interpreter's tools there.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return environment


# A line of the log that says why a rank ended: the last of a traceback, or a problem of the recipe.
_REASON = re.compile(
    r"^(?:\[rank\d+\]: ?)?(?:  - (?P<problem>.+)|(?P<error>[\w.]*(?:Error|Exception)\b.*))$", re.M
)


def _failed(strategy: Strategy, code: int, log: Path) -> Outcome:
    text = log.read_text(errors="replace")
    reason = _REASON.search(text)
    error = (reason["problem"] or reason["error"]).strip() if reason else f"exit code {code}"
    # A process that the kernel kills for memory leaves no message of its own.
    signs = ("OutOfMemoryError", "MemoryError", "exits with return code = -9")
    status = "out of memory" if any(sign in text for sign in signs) else "failed"
    return Outcome(strategy.name, _label(strategy), status=status, error=f"{error}; see {log}")


def _read(what: Comparison, strategy: Strategy, run: Path, stage: int) -> Outcome:
    metrics = json.loads((run / "metrics.json").read_text())
    measures = json.loads((run / "measures.json").read_text())
    memory, highest = measures["memory"], measures["highest"]
    return Outcome(
        name=strategy.name,
        label=_label(strategy),
        metrics=metrics["metrics"],
        loss=metrics["training"].get("loss"),
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
        gpus={
            label: gpus_needed(memory["at_peak"], what.ranks, stage, size) for label, size in what.gpu_memory
        },
        surroundings={key: metrics[key] for key in ("engine", "world_size", "seed", "versions", "hardware")},
        output_dir=str(run),
    )
