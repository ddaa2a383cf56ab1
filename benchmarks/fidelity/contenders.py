"""What is compared: full fine-tuning, LoRA, the policies, and the settings of ours, each as values of a `Run`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CONTENDERS", "LEVERS", "frozen"]


def frozen(policy: str, rate: float, **freeze: Any) -> dict[str, Any]:
    """A `slimfit` block."""
    states = freeze.pop("optimizer_states", None)
    activations = freeze.pop("activations", None)
    block: dict[str, Any] = {"freeze": {"policy": policy, "rate": rate, **freeze}}
    if states:
        block["optimizer_states"] = states
    if activations:
        block["activations"] = activations
    return block


_POLICIES: dict[str, dict[str, Any]] = {
    # The paper's, and whole layers with what was found to help them: a statistic of the gradient, a head that always trains.
    "ils": frozen("ils", 0.9),
    "ils+": frozen("ils", 0.9, head="always", always_lr_scale=3.0, statistic="gradient_norm"),
    # `policy: auto`, spelled out so that old results keep their meaning.
    "ours": frozen("columns", 0.9),
    # What it gains by the word embedding.
    "ours-nowords": frozen("columns", 0.9, never_active=["*word_embeddings*"]),
    "random": frozen("random", 0.9),
    "lisa": frozen("lisa", 0.9, interval=20),
    "badam": frozen("badam", 0.9, interval=20, optimizer_states={"stale_moments": "reset"}),
}


def _at(block: Mapping[str, Any], rate: float) -> dict[str, Any]:
    return {**block, "freeze": {**block["freeze"], "rate": rate}}


CONTENDERS: dict[str, dict[str, Any]] = {
    "full": {},
    **{f"lora{r}": {"lora": {"r": r, "alpha": 2.0 * r}} for r in (4, 8, 16)},
    # All linear layers of one block of six: a sixth of the inputs, where ours keeps a tenth.
    "lora8-sixth": {
        "lora": {
            "r": 8,
            "alpha": 16.0,
            "target_modules": r".*\.layers?\.5\..*(proj|fc1|fc2|query|key|value|dense)",
        }
    },
    **{
        f"{name}-{round(100 * rate)}": {"slimfit": _at(block, rate)}
        for name, block in _POLICIES.items()
        for rate in (0.9, 0.95)
    },
    "ours-99": {"slimfit": _at(_POLICIES["ours"], 0.99)},
    **{
        f"ours-90-{preset}": {"slimfit": {**_POLICIES["ours"], "activations": preset}}
        for preset in ("balanced", "lean", "minimal")
    },
}
"""The table of the issue: name -> fields of `Run`."""

_LEVERS: dict[str, dict[str, Any]] = {
    "statistic=relative_norm": {"statistic": "relative_norm"},
    "statistic=update_norm": {"statistic": "update_norm"},
    "statistic=gradient_norm": {"statistic": "gradient_norm"},
    "statistic=relative_gradient": {"statistic": "relative_gradient"},
    "statistic=taylor": {"statistic": "taylor"},
    "statistic=fisher": {"statistic": "fisher"},
    "lr_scale=auto": {"lr_scale": "auto"},
    "lr_scale=3": {"lr_scale": 3.0},
    "lr_scale=10": {"lr_scale": 10.0},
    "refresh=40": {"refresh": 40},
    "interval=5": {"interval": 5},
    "interval=20": {"interval": 20},
    "head": {"head": "always"},
    "head 95": {"head": "always", "rate": 0.95},
    "norms, bytes": {
        "head": "always",
        "always_lr_scale": 3.0,
        "always_active": ["*norm*"],
        "budget": ["activations", "parameters"],
    },
    "warm start": {"rate": {"start": 0.5, "end": 0.9, "steps": 60}},
    "moments reset": {"optimizer_states": {"stale_moments": "reset"}},
    "moments decay": {"optimizer_states": {"stale_moments": "decay"}},
    "policy=top_gradient": {"policy": "top_gradient", "statistic": "gradient_norm"},
    "policy=progressive": {"policy": "progressive", "statistic": "gradient_norm"},
    "policy=far": {"policy": "far"},
    "policy=bsr": {"policy": "bsr"},
    "policy=columns": {"policy": "columns"},
    "policy=ils_per_cost": {"policy": "ils_per_cost", "budget": ["activations"]},
    "budget=activations": {"budget": ["activations"]},
}
LEVERS: dict[str, dict[str, Any]] = {
    name: {"slimfit": frozen(**{"policy": "ils", "rate": 0.9, **change})} for name, change in _LEVERS.items()
}
"""The paper's schedule at 90 % with one thing changed: name -> fields of `Run`."""
