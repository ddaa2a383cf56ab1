"""The DeepSpeed configuration of a run: the JSON file with the recipe's own settings laid over it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.recipe import Recipe

__all__ = ["deepspeed_config", "load_base", "merge", "replaced_values", "slimfit_block"]


def load_base(recipe: Recipe, folder: Path | None) -> dict[str, Any]:
    """The content of the recipe's `deepspeed` JSON; an empty mapping if it names none.

    Args:
        recipe: names a file, or holds the mapping itself.
        folder: folder of the recipe. A relative path is looked up from the working directory, then from this
            folder, then from the one above.

    Raises:
        ConfigError: no such file, or no JSON object in it.
    """
    if recipe.deepspeed is None:
        return {}
    if not isinstance(recipe.deepspeed, str):
        return copy.deepcopy(recipe.deepspeed)
    places = [Path()] if folder is None else [Path(), folder, folder.parent]
    candidates = [place / Path(recipe.deepspeed).expanduser() for place in places]
    try:
        path = next((candidate for candidate in candidates if candidate.is_file()), None)
    except (OSError, ValueError):
        path = None
    if path is None:
        raise ConfigError(
            [f"deepspeed: no such file: {recipe.deepspeed!r}; name a JSON file such as ds_configs/zero1.json"]
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError([f"deepspeed: {str(path)!r} is not JSON ({error})"]) from None
    if not isinstance(content, dict):
        raise ConfigError([f"deepspeed: {str(path)!r} must hold a JSON object, got {type(content).__name__}"])
    return content


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; anything else of `over` replaces."""
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = (
            merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
        )
    return merged


def slimfit_block(recipe: Recipe, base: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `"slimfit"` block of the run; None for plain DeepSpeed.

    The recipe's block is laid over the JSON's; an explicit `slimfit: null` switches it off; a recipe that does not
    speak of it leaves the JSON's as it is.
    """
    own = base.get("slimfit")
    if "slimfit" not in recipe.model_fields_set:
        return own
    if recipe.slimfit is None:
        return None
    return merge(own or {}, recipe.slimfit)


def deepspeed_config(recipe: Recipe, base: Mapping[str, Any], world_size: int) -> dict[str, Any]:
    """The configuration as `slimfit_ds.initialize` takes it.

    The JSON decides ZeRO, offloading and communication; batch sizes, clipping, precision and the optimizer's values
    are the recipe's, whatever the JSON says of them (`replaced_values` tells).

    Args:
        recipe: the recipe.
        base: the JSON.
        world_size: number of ranks.

    Raises:
        ConfigError: the JSON contradicts the recipe in a way that no one side can decide.
    """
    problems = []
    for block, dtype in (("bf16", "bf16"), ("fp16", "fp16")):
        stated = base.get(block, {})
        if not isinstance(stated, Mapping):
            problems.append(f"deepspeed.{block} must be a mapping with enabled, got {stated!r}")
        elif stated.get("enabled", "auto") not in ("auto", recipe.dtype == dtype):
            problems.append(
                f"deepspeed.{block}.enabled is {stated['enabled']!r}, but dtype is {recipe.dtype!r}; "
                f"set dtype={dtype if stated['enabled'] else 'fp32'}, or remove the block"
            )
    if "scheduler" in base:
        problems.append(
            "deepspeed.scheduler: the recipe's scheduler, lr and warm-up decide; remove the block"
        )
    optimizer = base.get("optimizer", {"type": "AdamW"})
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("type"), str):
        problems.append(f"deepspeed.optimizer must be a mapping with type and params, got {optimizer!r}")
    elif not isinstance(optimizer.get("params", {}), Mapping):
        problems.append(f"deepspeed.optimizer.params must be a mapping, got {optimizer['params']!r}")
    if problems:
        raise ConfigError(problems)
    config = merge(base, _batches(recipe, world_size))
    config["bf16"] = {**base.get("bf16", {}), "enabled": recipe.dtype == "bf16"}
    config["fp16"] = {**base.get("fp16", {}), "enabled": recipe.dtype == "fp16"}
    config["optimizer"] = _optimizer(recipe, base)
    config.setdefault("steps_per_print", 2**31)
    slimfit = slimfit_block(recipe, base)
    config.pop("slimfit", None)
    return config if slimfit is None else {**config, "slimfit": slimfit}


def replaced_values(base: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """A line for each number of the JSON that the recipe replaced by another one."""
    stated = {key: value for key, value in base.items() if isinstance(value, int | float)}
    lines = [
        f"{key} {value!r} -> {config[key]!r}"
        for key, value in stated.items()
        if key in config and config[key] != value
    ]
    old, new = base.get("optimizer", {}).get("params", {}), config["optimizer"]["params"]
    return lines + [
        f"{key} {value!r} -> {new[key]!r}"
        for key, value in old.items()
        if value != "auto" and new[key] != value
    ]


def _batches(recipe: Recipe, world_size: int) -> dict[str, Any]:
    micro = recipe.micro_batch_size or max(1, recipe.train_batch_size // world_size)
    return {
        "train_batch_size": recipe.train_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": max(1, recipe.train_batch_size // (micro * world_size)),
        "gradient_clipping": recipe.gradient_clipping or 0.0,
    }


def _optimizer(recipe: Recipe, base: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer block: AdamW unless the JSON names another, with the recipe's values."""
    own = {
        "lr": recipe.lr,
        "betas": list(recipe.betas),
        "eps": recipe.eps,
        "weight_decay": recipe.weight_decay,
    }
    stated = base.get("optimizer")
    if stated is None:
        zero = base.get("zero_optimization")
        offloads = isinstance(zero, Mapping) and zero.get("offload_optimizer") is not None
        # torch's AdamW needs no compiler, DeepSpeed's fused one is built with nvcc at first use; offloaded states
        # need DeepSpeed's own.
        return {"type": "AdamW", "params": own if offloads else {**own, "torch_adam": True}}
    params = stated.get("params", {})
    takes_all = stated["type"].lower() in ("adam", "adamw")
    used = own if takes_all else {key: value for key, value in own.items() if key in params or key == "lr"}
    return {**stated, "params": {**params, **used}}
