"""What rivals would need that cannot be simulated here: from a simulated LoRA step, by arithmetic on the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slimfit_ds.memory.tracker import MemoryReport

__all__ = ["Rival", "nf4_bytes", "rivals_by_arithmetic"]

_BYTES = {"bf16": 2, "fp16": 2}


def nf4_bytes(elements: int) -> float:
    """Return the bytes of weights in bitsandbytes' NF4 with double quantisation.

    Half a byte for each element; for each block of 64 a scale of 8 bits; for each 256 of these a float32. Source: Dettmers
    et al., "QLoRA", arXiv 2305.14314, section 3.
    """
    return elements / 2 + elements / 64 + 4 * elements / (64 * 256)


@dataclass(frozen=True)
class Rival:
    """What a method would need.

    Args:
        label: its name.
        needs: bytes on the device.
        host: bytes on the host.
        bound: whether `needs` is only a lower bound.
        copied: bytes from host to device in a step.
        as_lora: whether its matrix products are those of the LoRA step.
    """

    label: str
    needs: int
    host: int = 0
    bound: bool = False
    copied: int = 0
    as_lora: bool = False


def rivals_by_arithmetic(facts: Mapping[str, Any], lora: MemoryReport, dtype: str) -> list[Rival]:
    """Return what methods need whose base is packed or away from the device.

    Args:
        facts: of `planner.step.inspect_model`.
        lora: a simulated step of LoRA with gradient checkpointing.
        dtype: of the weights; only for 16 bits there are any.
    """
    width = _BYTES.get(dtype)
    if width is None or not facts["in_blocks"]:
        return []
    linear, in_blocks, block = facts["linear"], facts["in_blocks"], facts["largest_block"]
    every = facts["parameters"]
    # One layer at a time is unpacked to be multiplied; of a streamed base two blocks are there.
    packed = lora.peak - width * linear + nf4_bytes(linear) + width * facts["largest_linear"]
    streamed = lora.peak - width * in_blocks + 2 * width * block
    # What training a block needs beside its weights: activations as with LoRA, and all of the block's gradients.
    rest = lora.peak - lora.at_peak.get("parameters", 0) - lora.at_peak.get("optimizer", 0)
    away = int(rest + 2 * width * block + width * block)
    return [
        Rival("QLoRA rank 8 (NF4), gradient checkpointing: weights by arithmetic", int(packed), as_lora=True),
        Rival(
            "LoRA rank 8, base streamed: weights by arithmetic",
            int(streamed),
            width * in_blocks,
            copied=2 * width * in_blocks,  # forward, and backward with what is recomputed
            as_lora=True,
        ),
        Rival(
            "full, ZeRO 3 with offload_param and offload_optimizer: by arithmetic",
            away,
            (width + 16) * every,
            True,
        ),
        Rival(
            "full, weights, gradients and states on the host: by arithmetic",
            away,
            (2 * width + 12) * every,
            True,
        ),
    ]
