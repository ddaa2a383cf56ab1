"""The card of a model: which base, which data, settings and metrics, out of what a run has left beside its delta."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from slimfit_ds.deltas.base import Base
from slimfit_ds.deltas.delta import Delta
from slimfit_ds.environment import versions

__all__ = ["CARD", "append_section", "section", "write_card"]

CARD = "README.md"
_TITLE = "## Trained by slimfit_ds"
_TAG = "slimfit-ds"


def write_card(folder: Path, delta: Delta, base_folder: Path, beside: Path) -> None:
    """Write the card of a base with a delta in it.

    Args:
        folder: of the model.
        delta: what is merged.
        base_folder: has the base; its card tells the license.
        beside: the folder of the delta; its card, such as one of a Trainer, is continued.
    """
    from huggingface_hub import ModelCard, ModelCardData

    card = None
    with suppress(OSError, ValueError):  # None, or none that can be read.
        card = ModelCard.load(beside / CARD)
    if card is None:
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n# {delta.architecture}\n")
    data: Any = card.data
    data.library_name, data.tags = "transformers", sorted({*(data.tags or []), _TAG})
    if delta.base.revision is not None:  # Of the hub, where the name leads to it.
        data.base_model = data.base_model or delta.base.name
    with suppress(OSError, ValueError):
        for key, value in ModelCard.load(base_folder / CARD).data.to_dict().items():
            if key.startswith("license") and data.get(key) is None:
                data[key] = value
    facts = _Facts(beside)
    values = sum(tensor.numel() for tensor in delta.tensors.values())
    text = section(delta.base, facts.settings(), values, facts.data(), facts.metrics())
    card.text = _with_section(card.text, text)
    card.save(folder / CARD)


def append_section(file: Path, text: str) -> None:
    """Put a `section` at the end of a card, or in place of one that it has."""
    file.write_text(_with_section(file.read_text(encoding="utf-8"), text), encoding="utf-8")


def _with_section(card: str, text: str) -> str:
    before, _, own = card.partition(_TITLE)
    # What somebody has written behind it stays.
    _, heading, after = own.partition("\n## ")
    return f"{before.rstrip()}\n\n{text}" + (f"{heading}{after}" if heading else "")


def section(
    base: Base,
    settings: Any,
    values: int | None = None,
    data: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    notes: str = "",
) -> str:
    """The part of a card about a run.

    Args:
        base: what it started from.
        settings: the `slimfit` block; None: not known.
        values: how many numbers the delta has; None: not known.
        data: what it trained on; None: not known, or said elsewhere in the card.
        metrics: by name.
        notes: a paragraph at the end.
    """
    revision = f", revision `{base.revision}`" if base.revision else ""
    lines = [
        _TITLE,
        "",
        f"- base: `{base.name}`{revision}; SHA-256 of its tensors `{base.sha256}`",
        f"- version: slimfit_ds {versions().get('slimfit_ds', 'unknown')}",
    ]
    lines += [f"- trained: {values:,} numbers; all others are the base's to the bit"] if values else []
    lines += [f"- data: {data}"] if data else []
    lines += ["- settings:", "", "```json", json.dumps(settings, indent=1), "```"] if settings else []
    if metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.6g} |" for name, value in sorted(metrics.items())]
    return "\n".join([*lines, *(["", notes] if notes else []), ""])


class _Facts:
    """What a Trainer, `launch/train.py` or the engine have left in a folder, or in that of the run around it."""

    def __init__(self, folder: Path):
        checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        around = [folder.parent] if folder.name.startswith("checkpoint-") else []
        self._folders = [folder, *checkpoints[:1], *around]

    def _read(self, name: str) -> Iterator[Mapping[str, Any]]:
        import yaml

        for folder in self._folders:
            with suppress(OSError, ValueError, yaml.YAMLError):
                text = (folder / name).read_text(encoding="utf-8")
                found = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
                if isinstance(found, Mapping):
                    yield found

    def settings(self) -> Any:
        for recipe in self._read("recipe.yaml"):
            return recipe.get("slimfit")
        for state in self._read("trainer_state.json"):
            callbacks = state.get("stateful_callbacks")
            entry = callbacks.get("SlimFitCallback") if isinstance(callbacks, Mapping) else None
            if isinstance(entry, Mapping) and isinstance(entry.get("args"), Mapping):
                return entry["args"].get("config")
        with suppress(
            OSError, ValueError
        ):  # Pushed to the hub and fetched again, the folder has the card alone.
            text = (self._folders[0] / CARD).read_text(encoding="utf-8").partition(_TITLE)[2]
            return json.loads(text.partition("```json\n")[2].partition("```")[0])
        return None

    def data(self) -> str | None:
        return next(
            (json.dumps(recipe["data"]) for recipe in self._read("recipe.yaml") if "data" in recipe), None
        )

    def metrics(self) -> dict[str, Any]:
        for result in (*self._read("metrics.json"), *self._read("all_results.json")):
            found = result.get("metrics", result)
            return {key: v for key, v in found.items() if isinstance(v, int | float)}
        merged: dict[str, Any] = {}
        for state in self._read("trainer_state.json"):
            for entry in state.get("log_history") or []:
                merged |= {k: v for k, v in entry.items() if k.startswith(("eval_", "train_loss"))}
            merged |= {"steps": state["global_step"]} if "global_step" in state else {}
            break
        return {key: v for key, v in merged.items() if isinstance(v, int | float)}
