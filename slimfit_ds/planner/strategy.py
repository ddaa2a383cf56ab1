"""A way to train: stage, residency, recomputation, adapters, freezing. Pure values, no framework."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["DEFAULT_BUCKETS", "STRATEGIES", "TUNED_BUCKET", "Strategy", "get_strategy", "slimfit_block"]

DEFAULT_BUCKETS = None
TUNED_BUCKET = 2_000_000
"""Elements; DeepSpeed's default of 5e8 is gigabytes whatever the model's size (DeepSpeed#1302)."""


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
        slimfit: the `"slimfit"` block; None: no freezing.
        fused: a fused optimizer step without temporaries, as on CUDA.
        loss_chunk: tokens whose logits exist at a time (causal language models); None: all.
        dtype: overrides the workload's dtype.
        attention: overrides the workload's attention implementation.
        note: what this is, for tables.
    """

    name: str
    stage: int | None = 0
    bucket: int | None = TUNED_BUCKET
    offload: bool = False
    gradient_checkpointing: bool = False
    lora: int | None = None
    accumulation: int = 1
    slimfit: Mapping[str, Any] | None = None
    fused: bool = True
    loss_chunk: int | None = None
    dtype: str | None = None
    attention: str | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def with_(self, **changes: Any) -> Strategy:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def zero_block(self) -> dict[str, Any]:
        """DeepSpeed's `zero_optimization` block."""
        block: dict[str, Any] = {"stage": self.stage or 0}
        if self.bucket is not None:
            block |= {"reduce_bucket_size": self.bucket, "allgather_bucket_size": self.bucket}
            if self.stage == 3:
                block |= {
                    "stage3_prefetch_bucket_size": self.bucket,
                    "stage3_param_persistence_threshold": 10_000,
                }
                block |= {
                    "stage3_max_live_parameters": 10 * self.bucket,
                    "stage3_max_reuse_distance": 10 * self.bucket,
                }
        if self.offload:
            block["offload_optimizer"] = {"device": "cpu"}
        return block

    def deepspeed_config(self, micro_batch: int, dtype: str, world_size: int) -> dict[str, Any]:
        """The whole DeepSpeed configuration, slimfit block included, without an optimizer."""
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
    preset: str, rate: float = 0.95, residency: str = "host", **activations: Any
) -> dict[str, Any]:
    """A `"slimfit"` block from its three main choices."""
    return {
        "freeze": {"policy": "ils", "rate": rate},
        "activations": {"preset": preset, **activations},
        "optimizer_states": {"inactive": residency},
    }


_ALL = (
    Strategy("full", note="full fine-tuning, ZeRO 0"),
    *(Strategy(f"zero{stage}", stage, note=f"full, ZeRO {stage}, tuned buckets") for stage in range(4)),
    *(
        Strategy(f"zero{stage}_default", stage, DEFAULT_BUCKETS, note=f"full, ZeRO {stage}, default buckets")
        for stage in range(4)
    ),
    Strategy("zero2_offload", 2, offload=True, note="full, ZeRO 2, optimizer on the host"),
    Strategy("zero3_offload", 3, offload=True, note="full, ZeRO 3, optimizer on the host"),
    Strategy("gradient_checkpointing", gradient_checkpointing=True, note="full, blocks recomputed"),
    Strategy("lora", lora=8, note="LoRA rank 8 on all linear layers"),
    Strategy(
        "adam8bit",
        slimfit={"freeze": {"policy": "none"}, "optimizer_states": {"precision": "8bit"}},
        note="full, 8-bit Adam states",
    ),
    *(
        Strategy(
            preset, stage=1, slimfit=slimfit_block(preset), note=f"SlimFit, preset {preset}, 95 % frozen"
        )
        for preset in ("exact", "paper", "balanced", "lean", "minimal", "ultra")
    ),
)
STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in _ALL}


def get_strategy(name: str) -> Strategy:
    """The registered strategy of this name.

    Raises:
        ValueError: unknown name; lists the known ones.
    """
    if name not in STRATEGIES:
        near = difflib.get_close_matches(name, STRATEGIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"strategy {name!r} is unknown; {hint}known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
