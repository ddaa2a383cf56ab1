"""SlimFit's settings from fastest to leanest: the order in which a budget is tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ERROR_CLASSES", "Rung", "ladder", "merged"]

# Relative error of the active layers' gradients, as measured on trained models (MiniLM / a ViT on digits);
# two minibatches differ by 1.3 and more. See docs/activations.md.
ERROR_CLASSES = {
    "exact": "none",
    "paper": "large (0.28 / 0.33)",
    "balanced": "small (0.05 / 0.03)",
    "lean": "small (0.010 / 0.006)",
    "minimal": "small (0.011 / 0.006)",
    "ultra": "moderate (0.15 / 0.08)",
}


@dataclass(frozen=True)
class Rung:
    """One setting of the ladder, as changes to a `"slimfit"` block."""

    label: str
    changes: Mapping[str, Any]

    @property
    def preset(self) -> str:
        """The activation preset."""
        return self.changes["activations"]["preset"]


def _rung(
    preset: str,
    residency: str,
    rate: float = 0.9,
    chunk: int | None = None,
    loss: int | None = None,
    frozen_embeddings: bool = False,
    small_states: bool = False,
) -> Rung:
    label = [f"{preset}, {rate:.0%} frozen, states on {residency}"]
    changes: dict[str, Any] = {
        "freeze": {"rate": rate},
        "activations": {"preset": preset},
        "optimizer_states": {"inactive": residency},
    }
    if chunk is not None:
        changes["activations"]["chunk_tokens"] = chunk
        label.append(f"chunks of {chunk} tokens")
    if loss is not None:
        changes["activations"]["chunk_loss_tokens"] = loss
        label.append("loss in chunks")
    if frozen_embeddings:
        changes["freeze"]["never_active"] = "embeddings"
        label.append("embeddings frozen")
    if small_states:
        changes["optimizer_states"]["precision"] = "8bit"
        label.append("8-bit states")
    return Rung(", ".join(label), changes)


def _rungs(loss: int | None) -> tuple[Rung, ...]:
    """All settings; `loss` tokens of a language model's head and loss at a time from the first compressed one on."""
    small: dict[str, Any] = {"loss": loss, "frozen_embeddings": True, "small_states": True}
    return (
        _rung("exact", "device"),
        _rung("exact", "host"),
        _rung("balanced", "host"),
        # No matrix product more: the gradients of the head are worked out with the loss, chunk by chunk.
        _rung("balanced", "host", loss=loss),
        _rung("minimal", "device", loss=loss),
        _rung("minimal", "host", loss=loss),
        _rung("minimal", "host", 0.95, loss=loss),
        _rung("minimal", "host", 0.95, 2048, loss=loss),
        _rung("minimal", "host", 0.95, 2048, loss=loss, frozen_embeddings=True),
        _rung("minimal", "host", 0.95, 2048, **small),
        _rung("minimal", "host", 0.98, 2048, **small),
        _rung("ultra", "host", 0.98, 1024, **small),
    )


# Tokens whose logits exist at a time: 0.5 GiB of fp32 logits and gradients each for a vocabulary of 128,000.
_LOSS_TOKENS = 1024


def ladder(
    fixed: Mapping[str, Any] | None = None, stage: int = 1, language_model: bool = False
) -> list[Rung]:
    """The settings that are left when the user has fixed some of them.

    Args:
        fixed: the user's own `"slimfit"` block; what it states is never changed.
        stage: ZeRO stage; stage 3 has no 8-bit states.
        language_model: the loss can be taken in chunks of tokens.

    Returns:
        Distinct settings, from fastest to leanest.
    """
    rungs: list[Rung] = []
    for rung in _rungs(_LOSS_TOKENS if language_model else None):
        changes = _without_fixed(rung.changes, fixed or {})
        if stage == 3:
            changes["optimizer_states"].pop("precision", None)
        label = rung.label if changes == rung.changes else f"{rung.label}, within what is fixed"
        preset = (fixed or {}).get("activations", {})
        preset = preset if isinstance(preset, str) else preset.get("preset")
        if preset is not None:
            changes["activations"]["preset"] = preset
        if all(changes != known.changes for known in rungs):
            rungs.append(Rung(label, changes))
    return rungs


def _without_fixed(changes: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    left: dict[str, Any] = {}
    for key, value in changes.items():
        stated = fixed.get(key, {})
        stated = {"preset": stated} if isinstance(stated, str) else stated
        left[key] = {name: inner for name, inner in value.items() if name not in stated}
    return left


def merged(fixed: Mapping[str, Any] | None, rung: Rung, embeddings: tuple[str, ...] = ()) -> dict[str, Any]:
    """The whole `"slimfit"` block: the user's values, completed by a rung.

    Args:
        fixed: the user's block.
        rung: what to add.
        embeddings: names of the model's embedding layers, for rungs that freeze them.
    """
    block = {key: value for key, value in (fixed or {}).items() if key != "memory_budget"}
    for key, value in rung.changes.items():
        stated = block.get(key, {})
        stated = {"preset": stated} if isinstance(stated, str) else dict(stated)
        block[key] = {**value, **stated}
    freeze = block["freeze"]
    if freeze.get("never_active") == "embeddings":
        freeze["never_active"] = list(embeddings)
        if not embeddings:
            del freeze["never_active"]
    return block
