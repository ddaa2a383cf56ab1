"""The model of a recipe: found, checked against the task by its configuration alone, then built."""

from __future__ import annotations

import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.recipe import LoraOptions, ModelFromConfig, Recipe
from slimfit_ds.training.tasks.base import Task

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

__all__ = [
    "add_adapters",
    "build_model",
    "fit_model_config",
    "head_problems",
    "parameter_groups",
    "read_model_config",
    "resolve_source",
]


def resolve_source(name: str, key: str = "model") -> str:
    """A hub id or the folder that `name` stands for.

    Args:
        name: hub id, local folder, or `package:NAME/FOLDER` for a folder inside an installed package.
        key: for the error message.

    Raises:
        ConfigError: no such package or folder.
    """
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        folder = (
            Path(next(iter(spec.submodule_search_locations))) / inner
            if spec and spec.submodule_search_locations
            else None
        )
        if folder is None:
            raise ConfigError(
                [f"{key}: package {package!r} is not installed; pip install {package.replace('_', '-')}"]
            )
        if not folder.is_dir():
            raise ConfigError([f"{key}: package {package!r} has no folder {inner!r}"])
        return str(folder)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep in name.rstrip("/")[-1:]
    try:
        exists = Path(name).expanduser().is_dir()
    except (OSError, ValueError):
        exists = False
    if exists:
        return str(Path(name).expanduser())
    if looks_local:
        raise ConfigError([f"{key}: no such folder: {name!r}"])
    return name


def read_model_config(recipe: Recipe, source: str | None) -> PretrainedConfig:
    """The transformers configuration of the recipe's model.

    Args:
        recipe: names the model.
        source: the resolved place of the model; None for a model that is initialised.

    Raises:
        ConfigError: there is no such model, or its configuration is malformed.
    """
    from transformers import AutoConfig

    if source is None:
        assert isinstance(recipe.model, ModelFromConfig)
        return _config_from_values(recipe.model.config)
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # network, authorisation, malformed files
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise ConfigError([f"model: cannot load {str(recipe.model)!r} ({reason})"]) from None


def fit_model_config(config: PretrainedConfig, recipe: Recipe, task: Task[Any]) -> None:
    """Give the configuration the values that the data decide.

    Args:
        config: changed in place.
        recipe: names the model.
        task: after `study`.

    Raises:
        ConfigError: the model does not fit the data.
    """
    values = task.model_values()
    head = task.model_class.removeprefix("AutoModel")
    if isinstance(recipe.model, ModelFromConfig):
        has_head = "num_labels" in recipe.model.config
    else:
        has_head = any(name.endswith(head) for name in config.architectures or ())
    wanted = values.get("num_labels", len(values["id2label"]) if "id2label" in values else None)
    problems = task.model_problems(config)
    if has_head and wanted not in (None, config.num_labels) and not task.options.new_head:
        problems.append(
            f"model: its head has {config.num_labels} outputs, the data need {wanted}; "
            "choose another model or data set, or set task.new_head=true"
        )
    if problems:
        raise ConfigError(problems)
    for name, value in values.items():
        setattr(config, name, value)


def head_problems(config: PretrainedConfig, task: Task[Any]) -> list[str]:
    """Whether this kind of model has the head that the task needs."""
    import transformers

    known = getattr(transformers, task.model_class)._model_mapping._model_mapping
    if config.model_type in known:
        return []
    head = task.model_class.removeprefix("AutoModelFor")
    return [
        f"model: {config.model_type!r} has no head for task {task.name!r} ({head}); "
        "choose another model or another task.name"
    ]


def _config_from_values(values: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        raise ConfigError(
            [
                f"model.config.model_type must be a model type of transformers, such as vit or bert, got {kind!r}"
            ]
        )
    rest = {key: value for key, value in values.items() if key != "model_type"}
    try:
        defaults = AutoConfig.for_model(kind)
        unknown = [key for key in rest if not hasattr(defaults, key)]
        if unknown:
            raise ConfigError(
                [f"model.config.{key} is not a value of a {kind} configuration" for key in unknown]
            )
        return AutoConfig.for_model(kind, **rest)
    except ConfigError:
        raise
    except Exception as error:  # transformers checks values by dataclass validators of its own
        raise ConfigError([f"model.config: {' '.join(str(error).split()):.300}"]) from None


def build_model(recipe: Recipe, source: str | None, config: PretrainedConfig, task: Task[Any]) -> nn.Module:
    """The model with the task's head, in float32 on the CPU, every weight trainable.

    Weights that no file holds are drawn from the random state of torch: seed it before.
    """
    import torch
    import transformers
    from torch.utils.checkpoint import checkpoint

    auto = getattr(transformers, task.model_class)
    if source is None:
        model = auto.from_config(config)
    else:
        model = auto.from_pretrained(
            source, config=config, dtype=torch.float32, ignore_mismatched_sizes=task.options.new_head
        )
    model = model.float()
    if recipe.gradient_checkpointing:
        # The public switch may force the backward pass down to the embeddings; reentrant checkpointing loses the
        # gradients of a block whose inputs need none.
        model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))
    return add_adapters(model, recipe.lora) if recipe.lora is not None else model


def add_adapters(model: nn.Module, options: LoraOptions) -> nn.Module:
    """The model with low-rank adapters; everything else but the task's head is frozen for good."""
    from peft import LoraConfig, get_peft_model

    heads = [name for name, _ in model.named_children() if name in {"classifier", "score", "qa_outputs"}]
    targets = options.target_modules
    return get_peft_model(
        model,
        LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            target_modules=targets,
            modules_to_save=heads or None,
        ),
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weights with decay, biases and norms (one dimension) without."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
