"""The training loop: from a recipe to a trained model and its numbers."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.batches import BatchPlan, training_loader
from slimfit_ds.training.best import Best
from slimfit_ds.training.checkpoints import load_checkpoint, remove_old, save_checkpoint, save_model
from slimfit_ds.training.checks import Inspection, inspect
from slimfit_ds.training.deepspeed_config import replaced_values
from slimfit_ds.training.distributed import Ranks, export, main_rank_first, read_ranks, share
from slimfit_ds.training.endings import RunStopped
from slimfit_ds.training.engine_of_recipe import make_engine
from slimfit_ds.training.evaluation import evaluate
from slimfit_ds.training.history import History
from slimfit_ds.training.noise import silence
from slimfit_ds.training.not_finite import NotFinitePolicy, check_weights
from slimfit_ds.training.output import resolved_yaml
from slimfit_ds.training.progress import Progress
from slimfit_ds.training.recipe import Draft, Recipe
from slimfit_ds.training.result import write_result
from slimfit_ds.training.run_monitor import RunMonitor
from slimfit_ds.training.stop_signals import StopSignals
from slimfit_ds.training.surroundings import peak_memory, reset_peak_memory
from slimfit_ds.training.survival import survival
from slimfit_ds.training.whole_files import write_whole

__all__ = ["train"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(draft: Draft, ranks: Ranks | None = None) -> dict[str, Any]:
    """Train as a recipe says and write the results to its output folder.

    Args:
        draft: from `read_recipe`.
        ranks: this process among all; None: read from the launcher's environment.

    Returns:
        the content of `metrics.json`, the same on every rank.

    Raises:
        ConfigError: all problems of the recipe, before any process group or model is made.
        RunEnding: the run ended early for one of the reasons in `training.endings`.
    """
    silence()
    ranks = ranks or read_ranks()
    found = inspect(draft, ranks)
    if found.output.action == "finished":
        return json.loads((found.output.folder / "metrics.json").read_text(encoding="utf-8"))
    from slimfit_ds.engine.processes import start_processes

    replaced = replaced_values(found.base, found.deepspeed)
    if ranks.is_main and replaced:
        print(f"values of the recipe in place of the JSON's: {', '.join(replaced)}", file=sys.stderr)
    export(ranks)
    device = start_processes()
    # Ranks may have seen a shared file system at different moments: the first one's choice holds.
    found.output = share(found.output)
    with survival(found.recipe, found.output.folder, ranks) as stops:
        return Run(found, device, stops).go()


class Run:
    """One run on one rank, after the checks.

    Args:
        found: the sound recipe with its task, data and configurations.
        device: of this rank.
        stops: requests to stop; None: nobody can ask.
    """

    def __init__(self, found: Inspection, device: torch.device, stops: StopSignals | None = None):
        self.recipe: Recipe = found.recipe
        self.ranks, self.task, self.device = found.ranks, found.task, device
        self.original = found.splits.evaluation
        self.plan_of_output = found.output
        self.folder: Path = found.output.folder
        self._stops = stops
        self._stop_agreed = False
        self._not_finite = NotFinitePolicy(self.recipe)
        with main_rank_first():
            self.training = self.task.prepare(found.splits.train, training=True)
            self.evaluation = self.task.prepare(found.splits.evaluation, training=False)
        if len(self.training) < self.recipe.train_batch_size:
            raise ConfigError(
                [
                    f"train_batch_size must be at most the {len(self.training)} training examples, "
                    f"got {self.recipe.train_batch_size}"
                ]
            )
        self.batches = BatchPlan(
            len(self.training),
            self.recipe.train_batch_size,
            found.deepspeed["train_micro_batch_size_per_gpu"],
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            seed=self.recipe.seed,
            terms=self.task.loss_terms(self.training),
        )
        epochs_steps = round((self.recipe.epochs or 0) * self.batches.steps_per_epoch)
        self.steps = self.recipe.max_steps or max(1, epochs_steps)
        self.micro_batch: int = found.deepspeed["train_micro_batch_size_per_gpu"]
        metric = self.recipe.best_metric or self.task.best_metric
        self.best = Best(metric, lower=metric in self.task.lower_is_better)
        self.engine = make_engine(found, self.steps, self._example_batch)
        self.first_step, self.seconds = self._resume()
        self.tokens_per_second: list[float] = []
        self.monitor = RunMonitor(self, found.monitors)

    def _example_batch(self) -> dict[str, Tensor]:
        """A batch of the largest shape that training will see."""
        batch = dict(next(iter(self._loader(0, 1))))
        longest = getattr(self.task.options, "max_length", None)
        if longest is not None and "input_ids" in batch:
            batch["input_ids"] = batch["input_ids"].new_zeros(self.micro_batch, longest)
        return batch

    def _loader(self, start: int, stop: int) -> Any:
        return training_loader(
            self.training,
            self.task,
            self.batches,
            start=start,
            stop=stop,
            seed=self.recipe.seed,
            workers=self.recipe.num_workers,
        )

    def _resume(self) -> tuple[int, list[float]]:
        """The next step and the seconds of the steps done."""
        source = self.plan_of_output.resume_from
        if source is None:
            return 0, []
        state = load_checkpoint(self.engine, source, self.ranks)
        self.best.value, self.best.step = state["best_value"], state["best_step"]
        self._not_finite.skipped = state.get("skipped", 0)
        return state["step"], state["seconds"]

    def go(self) -> dict[str, Any]:
        """All steps, then the final evaluation and the report."""
        history = self._open_output()
        if self._stops is not None:
            self._stops.start()
        self.monitor.start()
        with self.monitor:
            metrics = self._all_steps(history)
            return write_result(self, metrics or self._evaluate(self.steps))

    def _all_steps(self, history: History) -> dict[str, float]:
        """The latest evaluation; empty if there was no step left to do."""
        progress = Progress(
            self.first_step,
            self.steps,
            layers=len(getattr(self.engine, "layer_names", ())),
            metric=self.best.metric,
            shows=self.ranks.is_main,
        )
        reset_peak_memory(self.device)
        loader = iter(self._loader(self.first_step, self.steps))
        metrics: dict[str, float] = {}
        for step in range(self.first_step, self.steps):
            line = self.monitor.watch(step, partial(self._step, step, loader))
            done = step + 1
            if self._is_due(self.recipe.eval_steps, done):
                metrics = self._evaluate(done)
                line["evaluation"] = metrics
            history.add(line)
            self.monitor.log(line)
            progress.show(line, metrics)
            self._not_finite.judge(step, line["loss"], line["gradient_norm"])
            stopping = self._stop_agreed and done < self.steps
            if stopping or self._is_due(self.recipe.save_steps, done):
                history.sync()
                self._save(done)
            if stopping:
                assert self._stops is not None
                reason = self._stops.reason or "another rank was asked"
                raise RunStopped(f"stopped on request ({reason}) after step {done} of {self.steps}")
        progress.close()
        history.close()
        return metrics

    def _is_due(self, every: int | None, done: int) -> bool:
        return done == self.steps or (every is not None and done % every == 0)

    def _open_output(self) -> History:
        if self.ranks.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / "recipe.yaml", resolved_yaml(self.recipe))
        return History(self.folder / "history.jsonl", self.first_step, writes=self.ranks.is_main)

    def _step(self, step: int, loader: Any) -> dict[str, Any]:
        """One optimizer step; its line of the history."""
        self._seed_dropout(step)
        active = sorted_active(self.engine)
        rate = self.engine.get_lr()[0]
        totals = torch.zeros(3, device=self.device)  # loss, tokens, requests to stop
        start = time.perf_counter()
        for weight in self.batches.loss_weights(step):
            with self.monitor.phase("data"):
                batch = self._to_device(next(loader))
            with self.monitor.phase("forward"):
                loss = self.engine(**batch).loss * weight
                totals[0] += loss.detach() / self.batches.accumulation
                totals[1] += batch["attention_mask"].sum() if "attention_mask" in batch else 0
            with self.monitor.phase("backward"):
                if hasattr(self.engine, "require_finite"):
                    self.engine.require_finite(loss.detach())
                self.engine.backward(loss)
            with self.monitor.phase("step"):
                self.engine.step()
        totals[2] = float(self._stops is not None and self._stops.reason is not None)
        torch.distributed.all_reduce(totals)
        self._stop_agreed = totals[2].item() > 0
        mean_loss, tokens = totals[0].item() / self.ranks.world_size, int(totals[1].item())
        self.seconds.append(time.perf_counter() - start)
        self.tokens_per_second.append(tokens / self.seconds[-1])
        statistics = getattr(self.engine, "update_statistics", {})
        norm = self.engine.get_global_grad_norm()
        return {
            "step": step,
            "epoch": step / self.batches.steps_per_epoch,
            "loss": mean_loss,
            "lr": rate,
            "gradient_norm": None if norm is None else float(norm),
            "active_layers": active,
            "statistics": None if active is None else {name: statistics.get(name) for name in active},
            "memory_bytes": peak_memory(self.device),
            "seconds": self.seconds[-1],
            "tokens": tokens or None,
            **self.monitor.of_step(step, active),
        }

    def _seed_dropout(self, step: int) -> None:
        """Dropout is a function of step and rank, so that a resumed run goes on as if it had not stopped."""
        seed = np.random.SeedSequence([self.recipe.seed, step, self.ranks.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))

    def _to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The batch on this rank's device, its floating values in the model's type."""
        dtype = DTYPES[self.recipe.dtype]
        return {
            name: values.to(self.device, dtype if values.is_floating_point() else None, non_blocking=True)
            for name, values in batch.items()
        }

    def _evaluate(self, done: int) -> dict[str, float]:
        metrics = evaluate(
            self.engine,
            self.task,
            self.evaluation,
            self.original,
            ranks=self.ranks,
            batch=self.recipe.eval_batch_size or self.micro_batch,
            workers=self.recipe.num_workers,
            to_device=self._to_device,
        )
        # With one evaluation, at the end, the best model is the final one.
        if self.best.offer(metrics, done) and self.recipe.save_model and self.recipe.eval_steps:
            save_model(self.engine, self.task, self.folder / "best", self.ranks)
        return metrics

    def _save(self, done: int) -> None:
        check_weights(self.engine.module, done, self.device)
        state = {
            "best_value": self.best.value,
            "best_step": self.best.step,
            # The latest steps are enough for a median.
            "seconds": self.seconds[-1000:],
            "skipped": self._not_finite.skipped,
        }
        save_checkpoint(self.engine, self.folder, done, state)
        torch.distributed.barrier()
        if self.ranks.is_main:
            remove_old(self.folder, done, self.recipe.keep_last, self.best.step)


def sorted_active(engine: Any) -> list[str] | None:
    """The layers that train in the coming step, in model order; None if the engine trains everything."""
    names = getattr(engine, "layer_names", None)
    if names is None:
        return None
    active = engine.active_layers
    return [name for name in names if name in active]
