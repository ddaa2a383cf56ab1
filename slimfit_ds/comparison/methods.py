"""The methods that a recipe can be run by, each as overrides of the recipe."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass

from slimfit_ds.planner.strategies import STRATEGIES

__all__ = ["DEFAULT_METHODS", "METHODS", "Method", "get_method"]

_PRESETS = ("exact", "paper", "balanced", "lean", "minimal", "ultra")


@dataclass(frozen=True)
class Method:
    """One row of a comparison.

    Args:
        name: key on the command line.
        label: what tables and pictures call it.
        overrides: `key=value` laid over the recipe, before those of the user.
        stage: ZeRO stage, for the arithmetic of other GPU counts; None: that of the recipe.
        tuned: give the recipe's DeepSpeed JSON small buckets. DeepSpeed's default is a gigabyte for any model, and a
            comparison against that says little.
    """

    name: str
    label: str
    overrides: tuple[str, ...] = ()
    stage: int | None = None
    tuned: bool = True


def _zero(name: str) -> str:
    return "deepspeed=" + json.dumps({"zero_optimization": STRATEGIES[name].zero_block()})


_ALL = (
    Method("full", "full fine-tuning", ("slimfit=null",)),
    Method("full_as_stated", "full fine-tuning, buckets as the recipe", ("slimfit=null",), tuned=False),
    Method("slimfit", "SlimFit (as the recipe)"),
    *(
        Method(
            f"zero{stage}",
            f"full, ZeRO {stage}, tuned buckets",
            ("slimfit=null", _zero(f"zero{stage}")),
            stage,
            False,
        )
        for stage in range(4)
    ),
    *(
        Method(
            f"zero{stage}_default",
            f"full, ZeRO {stage}, default buckets",
            ("slimfit=null", _zero(f"zero{stage}_default")),
            stage,
            tuned=False,
        )
        for stage in range(4)
    ),
    Method(
        "gradient_checkpointing",
        "full, gradient checkpointing",
        ("slimfit=null", "gradient_checkpointing=true"),
    ),
    Method("lora", "LoRA, rank 8", ("slimfit=null", "lora={r: 8}")),
    *(
        Method(preset, f"SlimFit {preset}", (f"slimfit.activations={{preset: {preset}}}",))
        for preset in _PRESETS
    ),
    *(
        Method(
            f"{preset}_host",
            f"SlimFit {preset}, states on host",
            (f"slimfit.activations={{preset: {preset}}}", "slimfit.optimizer_states.inactive=host"),
        )
        for preset in _PRESETS
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}

DEFAULT_METHODS = (
    *(f"zero{stage}" for stage in range(4)),
    "gradient_checkpointing",
    "lora",
    "balanced",
    "lean",
    "minimal",
)


def get_method(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: unknown name; says which are known.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"strategies: {name!r} is unknown; {hint}known: {', '.join(METHODS)}")
    return METHODS[name]
