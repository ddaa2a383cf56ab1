"""What rivals would need that cannot be simulated here: from a simulated LoRA step, by arithmetic on the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimfit_ds.memory.tracker import MemoryReport

__all__ = ["nf4_bytes", "rivals_by_arithmetic"]

_BYTES = {"bf16": 2, "fp16": 2}


def nf4_bytes(elements: int) -> float:
    """Return the bytes of weights in bitsandbytes' NF4 with double quantisation.

    Half a byte for each element; for each block of 64 a scale of 8 bits; for each 256 of these a float32. Source: Dettmers
    et al., "QLoRA", arXiv 2305.14314, section 3.
    """
    return elements / 2 + elements / 64 + 4 * elements / (64 * 256)


def rivals_by_arithmetic(
    facts: Mapping[str, Any], lora: MemoryReport, dtype: str
) -> list[tuple[str, int, int, bool]]:
    """Return rows of methods whose base is packed or away from the device.

    Args:
        facts: of `planner.step.inspect_model`.
        lora: a simulated step of LoRA with gradient checkpointing.
        dtype: of the weights; only for 16 bits there are rows.

    Returns:
        Label, bytes on the device, bytes on the host, whether the first is only a lower bound.
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
    away = rest + 2 * width * block + width * block
    return [
        ("QLoRA rank 8 (NF4), gradient checkpointing: weights by arithmetic", int(packed), 0, False),
        ("LoRA rank 8, base streamed: weights by arithmetic", int(streamed), width * in_blocks, False),
        (
            "full, ZeRO 3 with offload_param and offload_optimizer: by arithmetic",
            int(away),
            (width + 16) * every,
            True,
        ),
        (
            "full, weights, gradients and states on the host: by arithmetic",
            int(away),
            (2 * width + 12) * every,
            True,
        ),
    ]
