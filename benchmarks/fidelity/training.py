"""One fine-tuning run of the study, through `slimfit_ds.slim(...).follow(optimizer)`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from problems import PROBLEMS, Problem
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import slimfit_ds
from slimfit_ds.training.learning_rate import rate_factor
from slimfit_ds.training.models import add_adapters, parameter_groups
from slimfit_ds.training.recipe import LoraOptions
from slimfit_ds.training.surroundings import hardware
from slimfit_ds.training.tasks.metrics import classification_metrics

__all__ = ["Run", "train"]

EVALUATION_BATCH = 128
BATCHES_SORTED = 8
# The curves are drawn from a sixth of the held-out examples; the last value is of all of them.
CURVE_PART = 6
WARMUP_SHARE = 0.06


@dataclass(frozen=True)
class Run:
    """What decides the outcome of a run; the same values give the same numbers.

    Args:
        problem: key of `PROBLEMS`.
        contender: what the tables call it.
        lr: highest learning rate.
        seed: of the data order, the new head, dropout and the schedule.
        slimfit: the `slimfit` block; None: everything trains.
        lora: options of PEFT's adapters.
        steps, batch: optimizer steps and examples of each; None: the problem's own.
        evaluations: how often the held-out examples are scored, at equal distances; the last one at the end.
    """

    problem: str
    contender: str
    lr: float
    seed: int = 0
    slimfit: Mapping[str, Any] | None = None
    lora: Mapping[str, Any] | None = None
    steps: int | None = None
    batch: int | None = None
    weight_decay: float = 0.01
    evaluations: int = 5

    def sized(self) -> Run:
        """The same with the problem's number of steps and batch where none is given."""
        problem = PROBLEMS[self.problem]
        return replace(self, steps=self.steps or problem.steps, batch=self.batch or problem.batch_size)


def train(run: Run) -> dict[str, Any]:
    """Train and score; the run's outcome as JSON values.

    Seconds are CPU seconds of this process in training steps, without the evaluations.
    """
    run = run.sized()
    problem = PROBLEMS[run.problem]
    torch.manual_seed(run.seed)
    model = problem.model().train()
    pretrained = fingerprint(model)
    if run.lora is not None:
        model = add_adapters(model, LoraOptions(**run.lora))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW(parameter_groups(model, run.weight_decay), lr=run.lr, fused=True)
    scheduler = LambdaLR(optimizer, rate_factor("linear", run.steps, round(WARMUP_SHARE * run.steps)))
    handle = None
    if run.slimfit is not None:
        block = {**run.slimfit, "freeze": {"seed": run.seed, **run.slimfit.get("freeze", {})}}
        handle = slimfit_ds.slim(model, block).follow(optimizer)
    sizes = {layer.name: layer.numel for layer in handle.schedule.layers} if handle else {}
    order = batches_of_like_length(problem.lengths(), run.batch, run.steps, run.seed)
    curve: list[dict[str, float]] = []
    visits: dict[str, int] = {}
    active_weights = 0
    losses: list[float] = []
    seconds = 0.0
    marks = {round(run.steps * part / run.evaluations) for part in range(1, run.evaluations + 1)}
    for step in range(run.steps):
        start = time.process_time()
        if handle:
            for name in handle.active_layers:
                visits[name] = visits.get(name, 0) + 1
                active_weights += sizes[name]
        batch = problem.batch(order[step], np.random.default_rng([run.seed, step]))
        torch.manual_seed(int(np.random.SeedSequence([run.seed, step]).generate_state(1)[0]))
        with torch.autocast("cpu", torch.bfloat16, enabled=problem.autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
        seconds += time.process_time() - start
        if step + 1 in marks:
            part = 1 if step + 1 == run.steps else CURVE_PART
            metrics, right = score(model, problem, part)
            curve.append({"step": step + 1, "seconds": seconds, **metrics})
    return {
        "run": asdict(run),
        "metric": problem.metric,
        "value": metrics[problem.metric],
        "metrics": metrics,
        "curve": curve,
        "train_loss": float(np.mean(losses[-50:])),
        "seconds": seconds,
        "trainable": trainable,
        "visits": visits,
        "mean_active_weights": active_weights / run.steps if handle else None,
        "layers": len(sizes) or None,
        "right": "".join("01"[hit] for hit in right),
        "cpu": hardware(torch.device("cpu"))["cpu"],
        "pretrained": pretrained,
    }


def fingerprint(model: nn.Module) -> str:
    """Twelve hexadecimal digits that tell pretrained weights apart: of the model without its new head."""
    digest = hashlib.sha256()
    for name, weight in getattr(model, "base_model", model).named_parameters():
        if "pooler" not in name:
            digest.update(weight.detach().numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def score(model: nn.Module, problem: Problem, part: int = 1) -> tuple[dict[str, float], list[bool]]:
    """The metrics over every `part`-th held-out example, and which of them were right, in order."""
    model.eval()
    logits, labels, places = [], [], []
    for positions, batch in problem.evaluation(EVALUATION_BATCH, part):
        with torch.autocast("cpu", torch.bfloat16, enabled=problem.autocast):
            logits.append(model(**batch).logits.float().numpy())
        labels.append(batch["labels"].numpy())
        places.append(positions)
    model.train()
    all_logits, all_labels = np.concatenate(logits), np.concatenate(labels)
    right = (all_logits.argmax(-1) == all_labels)[np.argsort(np.concatenate(places))]
    return classification_metrics(all_logits, all_labels), right.tolist()


def batches_of_like_length(lengths: np.ndarray, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """The examples of each step: a random order, in which each stretch of `BATCHES_SORTED` batches is sorted by length.

    Saves two fifths of the padding; the batches of a stretch come in random order.
    """
    chance = np.random.default_rng([seed, 0xBA7C])
    found: list[np.ndarray] = []
    while len(found) < steps:
        order = chance.permutation(len(lengths))
        for start in range(0, len(order) - batch + 1, batch * BATCHES_SORTED):
            stretch = order[start : start + batch * BATCHES_SORTED]
            stretch = stretch[np.argsort(lengths[stretch], kind="stable")]
            cut = [stretch[at : at + batch] for at in range(0, len(stretch) - batch + 1, batch)]
            found += [cut[i] for i in chance.permutation(len(cut))]
    return found[:steps]
