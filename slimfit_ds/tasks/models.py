"""The model of a recipe: found, checked against the task by its configuration alone, then built."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimfit_ds.environment import hub_is_reachable
from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.base import Task

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    from slimfit_ds.tasks.recipe import LoraOptions, Recipe

__all__ = ["add_adapters", "build_model", "fit_config", "place_of", "read_model_config", "resolve_source"]


def resolve_source(name: str, key: str = "model") -> str:
    """A hub id, a folder or a GGUF file that `name` stands for.

    Args:
        name: hub id, local folder or `.gguf` file, or `package:NAME/PATH` for one inside an installed package.
        key: for the error message.

    Raises:
        ConfigError: no such package, folder or file.
    """
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                [f"{key}: package {package!r} is not installed; pip install {package.replace('_', '-')}"]
            )
        path = Path(next(iter(spec.submodule_search_locations))) / inner
        if not path.exists():
            raise ConfigError([f"{key}: package {package!r} has no {inner!r}"])
        return str(path)
    try:
        path = Path(name).expanduser()
        exists = path.is_dir() or (path.suffix == ".gguf" and path.is_file())
    except (OSError, ValueError):
        exists = False
    if exists:
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(("/", ".gguf")):
        raise ConfigError([f"{key}: no such folder or GGUF file: {name!r}"])
    return name


def place_of(source: str) -> dict[str, str]:
    """A source as the arguments of `from_pretrained`: a GGUF file is named beside its folder."""
    path = Path(source)
    if path.suffix != ".gguf":
        return {"pretrained_model_name_or_path": source}
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def read_model_config(recipe: Recipe) -> tuple[str | None, PretrainedConfig]:
    """Where the model is (None: it is initialised), and its transformers configuration.

    Raises:
        ConfigError: there is no such model, or its configuration is malformed.
    """
    from transformers import AutoConfig

    if not isinstance(recipe.model, str):
        return None, _config_from_values(recipe.model.config)
    source = resolve_source(recipe.model)
    try:
        config = AutoConfig.from_pretrained(
            **place_of(source), local_files_only=not (Path(source).exists() or hub_is_reachable())
        )
    except Exception as error:  # network, authorisation, malformed files
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise ConfigError(
            [f"model: cannot load {recipe.model!r} ({reason}); {_remedy(source, reason)}"]
        ) from None
    return source, config


def _remedy(source: str, reason: str) -> str:
    """What helps where a model's configuration cannot be read."""
    if source.endswith(".gguf") and find_spec("gguf") is None:
        return "pip install gguf"
    if re.search("gated|401|403|restricted|authenticat", reason, re.IGNORECASE):
        return "accept its licence on the hub and log in (hf auth login), or name a folder that holds it"
    return "check the name and the network, or name a folder or package:NAME/PATH that holds it"


def fit_config(config: PretrainedConfig, recipe: Recipe, task: Task[Any]) -> None:
    """Give the configuration the values that the data decide.

    Args:
        config: changed in place.
        recipe: names the model.
        task: after `study`.

    Raises:
        ConfigError: the model does not fit the task or the data.
    """
    import transformers

    head = task.auto_class.removeprefix("AutoModelFor")
    if config.model_type not in getattr(transformers, task.auto_class)._model_mapping._model_mapping:
        raise ConfigError(
            [
                f"model: {config.model_type!r} has no head for task {task.name!r} ({head}); "
                "choose another model or another task.name"
            ]
        )
    values = task.model_values()
    has_head = (
        any(name.endswith(f"For{head}") for name in config.architectures or ())
        if isinstance(recipe.model, str)
        else "num_labels" in recipe.model.config
    )
    wanted = values.get("num_labels", len(values["id2label"]) if "id2label" in values else None)
    problems = task.model_problems(config)
    flash = (recipe.attn_implementation or "").partition("flash_attention_")[2]
    if flash and not getattr(transformers.utils, f"is_flash_attn_{flash}_available")():
        problems.append(
            f"attn_implementation: flash_attention_{flash} is not installed or has no GPU here; choose sdpa"
        )
    if has_head and wanted not in (None, config.num_labels) and not task.options.new_head:
        problems.append(
            f"model: its head has {config.num_labels} outputs, the data need {wanted}; "
            "choose another model or data set, or set task.new_head=true"
        )
    if problems:
        raise ConfigError(problems)
    for name, value in values.items():
        setattr(config, name, value)


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
        if unknown := [key for key in rest if not hasattr(defaults, key)]:
            raise ConfigError(
                [f"model.config.{key} is not a value of a {kind} configuration" for key in unknown]
            )
        return AutoConfig.for_model(kind, **rest)
    except ConfigError:
        raise
    except Exception as error:  # transformers checks values by dataclass validators of its own
        raise ConfigError([f"model.config: {' '.join(str(error).split()):.300}"]) from None


def build_model(
    source: str | None,
    config: PretrainedConfig,
    task: Task[Any],
    dtype: torch.dtype,
    lora: LoraOptions | None = None,
    attention: str | None = None,
) -> nn.Module:
    """The model with the task's head, every weight trainable.

    Weights that no file holds are drawn from the random state of torch: seed it before.

    Args:
        source: from `read_model_config`.
        config: after `fit_config`.
        task: names the head.
        dtype: of the weights.
        lora: add adapters, and train these only.
        attention: name of its implementation; None: transformers chooses.
    """
    import transformers

    auto = getattr(transformers, task.auto_class)
    chosen = {} if attention is None else {"attn_implementation": attention}
    if source is None:
        model = auto.from_config(config, dtype=dtype, **chosen)
    else:
        more = {}
        if source.endswith(".gguf"):
            # Left packed, the weights could not be trained.
            more["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = auto.from_pretrained(
            **place_of(source),
            config=config,
            dtype=dtype,
            ignore_mismatched_sizes=task.options.new_head,
            **chosen,
            **more,
        )
        if more:
            # What is trained and saved is not quantised.
            model.config.__dict__.pop("quantization_config", None)
            model.is_quantized = False
    return model if lora is None else add_adapters(model, lora)


def add_adapters(model: nn.Module, options: LoraOptions) -> nn.Module:
    """The model with low-rank adapters; everything else but the task's head is frozen for good."""
    from peft import LoraConfig, get_peft_model

    heads = [name for name, _ in model.named_children() if name in {"classifier", "score", "qa_outputs"}]
    return get_peft_model(
        model,
        LoraConfig(
            r=options.r,
            lora_alpha=options.alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            target_modules=options.target_modules,
            modules_to_save=heads or None,
        ),
    )
