"""The one catalogue of ways to train: for estimates, plans, comparisons and benchmarks. Pure values, no framework."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = [
    "GRADIENT_ERROR",
    "STRATEGIES",
    "TUNED_BUCKET",
    "ModelStates",
    "Strategy",
    "get_strategy",
    "slimfit_block",
    "zero_states",
]

TUNED_BUCKET = 2_000_000
"""Elements; DeepSpeed's default of 5e8 is gigabytes whatever the model's size (DeepSpeed#1302)."""

GRADIENT_ERROR = {
    "exact": "none",
    "paper": "large (0.38 / 0.33 / 0.39)",
    "balanced": "small (0.019 / 0.05 / 0.03)",
    "minimal": "small (0.018 / 0.010 / 0.006)",
    "ultra": "small (0.017 / 0.009 / 0.006)",
}
"""Activation preset -> relative error of the trained layers' gradients, as measured on trained models (SmolLM2, a
decoder, the largest of four settings / MiniLM / a ViT on digits); two minibatches differ by 1.3 and more. See docs/activations.md."""


@dataclass(frozen=True)
class Strategy:
    """How a workload is trained.

    Args:
        name: key in tables and on the command line.
        stage: ZeRO stage, or None for plain PyTorch without DeepSpeed.
        bucket: elements of the reduce and gather buckets; None: DeepSpeed's default.
        offload: DeepSpeed's `offload_optimizer` to the host.
        gradient_checkpointing: torch's checkpointing of every block.
        lora: rank of LoRA adapters on all linear layers (PEFT); None: none.
        accumulation: micro-batches per optimizer step.
        slimfit: the `"slimfit"` block; None: stock DeepSpeed. A comparison lays it over the block of its recipe.
        fused: a fused optimizer step without temporaries, as on CUDA.
        lr_factor: a comparison multiplies the recipe's learning rate by it.
        loss_chunk: tokens whose logits exist at a time (causal language models); None: all.
        dtype: overrides the workload's dtype.
        attention: overrides the workload's attention implementation.
        note: what this is, for tables.
        own_zero: a comparison takes this strategy's ZeRO block; otherwise that of its recipe, with its buckets cut
            down to `bucket`.
    """

    name: str
    stage: int | None = 0
    bucket: int | None = TUNED_BUCKET
    offload: bool = False
    gradient_checkpointing: bool = False
    lora: int | None = None
    accumulation: int = 1
    slimfit: Mapping[str, Any] | None = None
    lr_factor: float = 1.0
    fused: bool = True
    loss_chunk: int | None = None
    dtype: str | None = None
    attention: str | None = None
    note: str = ""
    own_zero: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    def with_(self, **changes: Any) -> Strategy:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    def zero_block(self) -> dict[str, Any]:
        """Return DeepSpeed's `zero_optimization` block."""
        block: dict[str, Any] = {"stage": self.stage or 0}
        if self.bucket is not None:
            block |= {"reduce_bucket_size": self.bucket, "allgather_bucket_size": self.bucket}
            if self.stage == 3:
                block |= {
                    "stage3_prefetch_bucket_size": self.bucket,
                    "stage3_param_persistence_threshold": 10_000,
                    "stage3_max_live_parameters": 10 * self.bucket,
                    "stage3_max_reuse_distance": 10 * self.bucket,
                }
        if self.offload:
            block["offload_optimizer"] = {"device": "cpu"}
        return block

    def deepspeed_config(self, micro_batch: int, dtype: str, world_size: int) -> dict[str, Any]:
        """Return the whole DeepSpeed configuration, slimfit block included, without an optimizer."""
        config: dict[str, Any] = {
            "train_batch_size": micro_batch * self.accumulation * world_size,
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": self.accumulation,
            "zero_optimization": self.zero_block(),
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        if dtype in ("bf16", "fp16"):
            config[dtype] = {"enabled": True}
        if self.slimfit is not None:
            config["slimfit"] = dict(self.slimfit)
        return config


def slimfit_block(
    preset: str, rate: float = 0.9, residency: str = "device", policy: str = "auto", **activations: Any
) -> dict[str, Any]:
    """Return a `"slimfit"` block from its main choices.

    Args:
        preset: of the activations.
        rate: share of the model that is frozen at each step.
        residency: where the optimizer states of frozen layers are: `device` or `host`.
        policy: `auto` is the recommended setting, `ils` the paper's schedule.
        activations: further fields of the activations block.
    """
    return {
        "freeze": {"policy": policy, "rate": rate},
        "activations": {"preset": preset, **activations},
        "optimizer_states": {"inactive": residency},
    }


def _presets() -> list[Strategy]:
    """Return SlimFit's strategies: each preset by itself, with states on the host, and under the paper's schedule."""
    host = {"optimizer_states": {"inactive": "host"}}
    made = []
    for preset in GRADIENT_ERROR:
        block = {"activations": {"preset": preset}}
        label = f"SlimFit {preset}"
        made += [
            Strategy(preset, 1, slimfit=block, note=label),
            Strategy(f"{preset}_host", 1, slimfit={**block, **host}, note=f"{label}, states on host"),
            Strategy(
                f"{preset}_ils",
                1,
                slimfit={"freeze": {"policy": "ils"}, **block, **host},
                note=f"{label}, the paper's schedule, states on host",
            ),
        ]
    return made


def _zero(stage: int, **options: Any) -> Strategy:
    words = "default buckets" if "bucket" in options else "tuned buckets"
    words = "optimizer on host" if "offload" in options else words
    name = f"zero{stage}" + ("_default" if "bucket" in options else "")
    name += "_offload" if "offload" in options else ""
    return Strategy(name, stage, note=f"full, ZeRO {stage}, {words}", own_zero=True, **options)


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("full", note="full fine-tuning"),
        *(_zero(stage) for stage in range(4)),
        *(_zero(stage, bucket=None) for stage in range(4)),
        *(_zero(stage, offload=True) for stage in (2, 3)),
        Strategy("gradient_checkpointing", gradient_checkpointing=True, note="full, gradient checkpointing"),
        # Its best rates are 6 to 15 times those of full fine-tuning (docs/fidelity.md).
        Strategy("lora", lora=8, lr_factor=10, note="LoRA, rank 8, at 10 times the rate"),
        Strategy(
            "adam8bit",
            slimfit={"freeze": {"policy": "none"}, "optimizer_states": {"precision": "8bit"}},
            note="full, 8-bit Adam states",
        ),
        Strategy("slimfit", 1, slimfit={}, note="SlimFit"),
        *_presets(),
        Strategy(
            "streamed",
            1,
            slimfit={"activations": {"preset": "minimal"}, "frozen_weights": {"live": "host"}},
            note="SlimFit minimal, frozen weights on host",
        ),
    )
}


def get_strategy(name: str) -> Strategy:
    """Return the strategy of this name.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"strategy {name!r} is unknown; {hint}known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


@dataclass(frozen=True)
class ModelStates:
    """Bytes of one rank."""

    weights: float
    gradients: float
    optimizer: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer


# Bytes per parameter of weights, gradients and (fp32 master, m, v).
_BYTES = {"fp32": (4, 4, 8), "bf16": (2, 2, 12), "fp16": (2, 2, 12)}


def zero_states(
    parameters: int, stage: int, ranks: int, dtype: str = "bf16", offload: bool = False
) -> ModelStates:
    """Return the model states of full fine-tuning with Adam under a ZeRO stage, by arithmetic.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
    arXiv 1910.02054, figure 1, and DeepSpeed's memory documentation. Without activations, buckets and working memory.

    Args:
        parameters: number of parameters (count `numel`: DeepSpeed's own counter is wrong on meta tensors).
        stage: 0 to 3; 1 divides the optimizer states, 2 also the gradients, 3 also the weights.
        ranks: data-parallel ranks.
        dtype: `fp32`, or `bf16` / `fp16` with fp32 master weights.
        offload: optimizer states (and the gradients they need) on the host.

    Returns:
        Bytes of one rank.
    """
    if dtype not in _BYTES:
        raise ValueError(f"dtype must be one of {', '.join(_BYTES)}, got {dtype!r}")
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage must be 0, 1, 2 or 3, got {stage!r}")
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks!r}")
    weight, gradient, state = _BYTES[dtype]
    optimizer = state * parameters / (ranks if stage >= 1 else 1)
    gradients = gradient * parameters / (ranks if stage >= 2 else 1)
    weights = weight * parameters / (ranks if stage >= 3 else 1)
    if offload:
        # The host keeps a fp32 copy of its share of the gradients for the host's Adam.
        return ModelStates(weights, gradients, 0.0, optimizer + 4 * parameters / ranks)
    return ModelStates(weights, gradients, optimizer)
