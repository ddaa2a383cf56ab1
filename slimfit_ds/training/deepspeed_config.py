"""The DeepSpeed configuration of a run: the JSON file with the recipe's own settings laid over it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimfit_ds.config import ConfigError
from slimfit_ds.training.recipe import Recipe

__all__ = ["deepspeed_config", "load_base", "merge", "slimfit_block"]


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

    Args:
        recipe: decides batch sizes, precision, clipping and the optimizer's values.
        base: the JSON.
        world_size: number of ranks.

    Raises:
        ConfigError: the JSON contradicts the recipe.
    """
    micro = recipe.micro_batch_size or max(1, recipe.train_batch_size // world_size)
    owned: dict[str, Any] = {
        "train_batch_size": recipe.train_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": max(1, recipe.train_batch_size // (micro * world_size)),
        "gradient_clipping": recipe.gradient_clipping or 0.0,
    }
    problems = [
        f'deepspeed.{key} is {base[key]!r}, but the recipe asks for {value!r}; write "auto" in the JSON'
        for key, value in owned.items()
        if base.get(key, "auto") not in ("auto", value)
    ]
    for block, dtype in (("bf16", "bf16"), ("fp16", "fp16")):
        stated = base.get(block, {})
        enabled = stated.get("enabled", "auto") if isinstance(stated, Mapping) else stated
        if enabled not in ("auto", recipe.dtype == dtype):
            problems.append(
                f'deepspeed.{block}.enabled is {enabled!r}, but dtype is {recipe.dtype!r}; write "auto" in the JSON'
            )
    if "scheduler" in base:
        problems.append(
            "deepspeed.scheduler: the recipe's scheduler, lr and warm-up decide; remove the block"
        )
    problems += _optimizer_problems(recipe, base)
    if problems:
        raise ConfigError(problems)
    config = merge(base, owned)
    config["bf16"] = {**config.get("bf16", {}), "enabled": recipe.dtype == "bf16"}
    config["fp16"] = {**config.get("fp16", {}), "enabled": recipe.dtype == "fp16"}
    config["optimizer"] = _optimizer(recipe, base)
    config.setdefault("steps_per_print", 2**31)
    config.setdefault("zero_allow_untested_optimizer", True)
    block = slimfit_block(recipe, base)
    config.pop("slimfit", None)
    return config if block is None else {**config, "slimfit": block}


def _optimizer(recipe: Recipe, base: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer block; its "auto" values come from the recipe."""
    stated = base.get("optimizer")
    if stated is None:
        # torch's own AdamW needs no compiler; DeepSpeed's fused one is built with nvcc at first use.
        return {"type": "AdamW", "params": {**_own_values(recipe), "torch_adam": True}}
    own = _own_values(recipe)
    params = {
        key: own[key] if value == "auto" and key in own else value for key, value in stated["params"].items()
    }
    return {**stated, "params": params}


def _own_values(recipe: Recipe) -> dict[str, Any]:
    return {
        "lr": recipe.lr,
        "betas": list(recipe.betas),
        "eps": recipe.eps,
        "weight_decay": recipe.weight_decay,
    }


def _optimizer_problems(recipe: Recipe, base: Mapping[str, Any]) -> list[str]:
    stated = base.get("optimizer")
    if stated is None:
        return []
    if (
        not isinstance(stated, Mapping)
        or not isinstance(stated.get("params"), Mapping)
        or "type" not in stated
    ):
        return [f"deepspeed.optimizer must be a mapping with type and params, got {stated!r}"]
    return [
        f"deepspeed.optimizer.params.{key} is {stated['params'][key]!r}, but the recipe asks for {value!r}; "
        'write "auto" in the JSON'
        for key, value in _own_values(recipe).items()
        if key in stated["params"] and stated["params"][key] not in ("auto", value)
    ]
