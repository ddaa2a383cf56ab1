"""The methods of the comparison, in the order of the table, with the priority of their cells."""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from peers_methods import ours, rivals
from peers_methods.building import Request
from peers_methods.trainers import Trainer
from peers_methods.workloads import Case
from slimfit_ds.planner.strategy import Strategy

__all__ = ["METHODS", "Method", "get_method"]


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        name: key on the command line.
        label: what the table calls it.
        build: makes the trainer; may raise `Unavailable`.
        tier: 0 is measured first; the budget drops the last.
        strategy: of a case, the same for the memory estimator; None: it knows no such thing.
        packages: imported ahead where they are installed, so that a prepared process is ready when its turn comes.
        tracked: steps whose storages are tracked; more where what trains changes from step to step.
        fake: where the estimator knows no such thing, makes the trainer on fake tensors; None: there is no simulation.
        micro_batch: of a case, samples of a forward pass whatever the batch; None: the whole batch.
    """

    name: str
    label: str
    build: Callable[[Request], Trainer]
    tier: int
    strategy: Callable[[Case], Strategy] | None = None
    packages: tuple[str, ...] = ()
    tracked: int = 2
    fake: Callable[[Request], Trainer] | None = None
    micro_batch: Callable[[Case], int] | None = None

    @property
    def simulated(self) -> bool:
        """Whether there is a way to simulate it."""
        return self.strategy is not None or self.fake is not None

    def import_ahead(self) -> None:
        """Import what the method will need; what is missing is told when it is built."""
        for package in ("transformers.modeling_utils", *self.packages):
            with contextlib.suppress(ImportError):
                importlib.import_module(package)


_ENGINE = ("deepspeed", "slimfit_ds.engine.engine")
_PLAIN = Strategy("plain", stage=None, dtype="bf16_autocast")
_LORA = Strategy("lora", None, lora=8, dtype="bf16")


def _always(strategy: Strategy) -> Callable[[Case], Strategy]:
    return lambda case: strategy


def _accumulation(case: Case) -> Strategy:
    return _PLAIN.with_(accumulation=min(2, case.workload.batch))


def _slim(preset: str, loss_chunk: int | None = None, policy: str = "ils", **activations: Any) -> Strategy:
    block = ours.block(preset, policy, **activations)
    return Strategy(preset, stage=0, slimfit=block, dtype="bf16", loss_chunk=loss_chunk)


def _tuned(case: Case, policy: str = "ils") -> Strategy:
    loss_chunk, options = ours.tuned(case)
    return _slim("minimal", loss_chunk, policy, **options)


def _ours(preset: str, tier: int) -> Method:
    label = f"ours, `{preset}`" if preset != "paper" else "the paper's codecs, our engine"
    build = partial(ours.ours, preset=preset)
    return Method(preset, label, build, tier, _always(_slim(preset)), _ENGINE, tracked=4)


def _auto(preset: str) -> Method:
    return Method(
        f"auto_{preset}",
        f"ours, `{preset}`, policy auto (columns)",
        partial(ours.ours, preset=preset, policy="auto"),
        1,
        _always(_slim(preset, policy="auto")),
        _ENGINE,
        tracked=4,
    )


def _fake(
    name: str, label: str, build: Callable[[Request], Trainer], tier: int = 3, **options: Any
) -> Method:
    """A method that trains fake tensors as it trains real ones."""
    return Method(name, label, build, tier, fake=build, **options)


_ALL = (
    Method("full", "full: fused AdamW, SDPA, bf16 autocast", rivals.full, 0, _always(_PLAIN)),
    Method(
        "full_bf16",
        "full, weights and states bf16 (no masters)",
        partial(rivals.full, dtype="bf16"),
        2,
        _always(Strategy("bf16", stage=None, dtype="bf16")),
    ),
    Method(
        "checkpointing",
        "full + gradient checkpointing",
        rivals.gradient_checkpointing,
        0,
        _always(_PLAIN.with_(gradient_checkpointing=True)),
    ),
    Method(
        "accumulation",
        "full + accumulation, micro-batch 8",
        rivals.accumulation,
        1,
        _accumulation,
        micro_batch=lambda case: rivals.micro_batch(case.workload.batch),
    ),
    Method("lora", "LoRA r 8 (PEFT), bf16 base", rivals.lora, 1, _always(_LORA), ("peft",)),
    Method(
        "lora_checkpointing",
        "LoRA r 8 + gradient checkpointing",
        partial(rivals.lora, checkpointing=True),
        1,
        _always(_LORA.with_(gradient_checkpointing=True)),
        ("peft",),
    ),
    _fake("torchao_8bit", "torchao AdamW8bit", rivals.torchao_8bit, packages=("torchao.optim",)),
    Method(
        "torchao_offload",
        "torchao CPUOffloadOptimizer",
        rivals.torchao_offload,
        3,
        fake=rivals.gradients_leave,
        packages=("torchao.optim",),
    ),
    _fake("bitsandbytes_8bit", "bitsandbytes Adam8bit", rivals.bitsandbytes_8bit, packages=("bitsandbytes",)),
    Method(
        "zero_offload",
        "DeepSpeed ZeRO-Offload (stage 2)",
        rivals.zero_offload,
        3,
        _always(Strategy("offload", stage=2, offload=True, dtype="bf16")),
        packages=("deepspeed",),
    ),
    _fake("galore", "GaLore, rank h/4", rivals.galore, packages=("galore_torch",)),
    _fake("apollo", "APOLLO, rank h/4", rivals.apollo, packages=("apollo_torch",)),
    _fake("apollo_mini", "APOLLO-Mini, rank 1", partial(rivals.apollo, mini=True), tier=4),
    _fake("badam", "BAdam, a block at a time", rivals.badam, packages=("badam",), tracked=24),
    _fake("lisa", "LISA, 2 blocks at a time (own lines)", rivals.lisa, tracked=4),
    _ours("paper", 1),
    _ours("balanced", 0),
    _ours("lean", 1),
    _ours("minimal", 0),
    _ours("ultra", 1),
    Method(
        "minimal_tuned",
        "ours, `minimal` in chunks",
        ours.ours_tuned,
        2,
        _tuned,
        _ENGINE,
        tracked=4,
    ),
    _auto("balanced"),
    _auto("minimal"),
    Method(
        "auto_tuned",
        "ours, `minimal` in chunks, policy auto (columns)",
        partial(ours.ours_tuned, policy="auto"),
        2,
        partial(_tuned, policy="auto"),
        _ENGINE,
        tracked=4,
    ),
    Method("full_again", "full, once more at the end (noise)", rivals.full, 5),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: unknown name; says which are known.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"methods: {name!r} is unknown; {hint}known: {', '.join(METHODS)}")
    return METHODS[name]
