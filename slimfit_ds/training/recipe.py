"""A recipe: one YAML file per task and model, every field of which can be overridden as `key=value`.

    draft = read_recipe("recipes/minilm_cola.yaml", ["data_dir=../shared/data/cola", "slimfit.freeze.rate=0.95"])

Reading never stops at the first mistake: the draft carries all problems found so far and the fields that can
still be trusted, so that `checks.inspect` can report those of the data, the model and the machine with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from slimfit_ds.errors import ConfigError, describe_validation_error

__all__ = ["Draft", "LoraOptions", "ModelFromConfig", "Recipe", "read_recipe"]

Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Strict(BaseModel):
    # strict: `max_steps: true` or `lr: "fast"` is a mistake to report, not something to convert.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelFromConfig(_Strict):
    """A model that is initialised instead of loaded."""

    config: dict[str, Any] = Field(description="a transformers configuration with its `model_type`")


class LoraOptions(_Strict):
    """Low-rank adapters by PEFT: a rival of freezing, offered for comparisons."""

    r: Count = Field(8, description="rank of the adapters")
    alpha: Positive = Field(16.0, description="scale of the adapters, divided by r")
    dropout: Share = 0.0
    target_modules: list[str] | str = Field("all-linear", description="names of the adapted linear layers")


def _named_task(value: Any) -> Any:
    """`task: causal_lm` is short for `task: {name: causal_lm}`."""
    return {"name": value} if isinstance(value, str) else value


def _named_model(value: Any) -> Any:
    """Dispatch by hand: a union would report each mistake once for every branch."""
    return ModelFromConfig.model_validate(value) if isinstance(value, Mapping) else value


def _path_or_mapping(value: Any) -> Any:
    if value is None or isinstance(value, str | dict):
        return value
    raise ValueError("must be the path of a DeepSpeed JSON file or a mapping")


def _backends(value: Any) -> Any:
    """`report_to: csv` is short for a list of one, `none` for an empty one."""
    value = [value] if isinstance(value, str) else value
    return [] if value == ["none"] else value


class Recipe(_Strict):
    """Everything that one training run needs to know."""

    task: Annotated[dict[str, Any], BeforeValidator(_named_task)] = Field(
        description="name of the task, or a mapping with `name` and the task's own options"
    )
    model: Annotated[str | ModelFromConfig, BeforeValidator(_named_model)] = Field(
        description="hub id, local folder, `package:NAME/FOLDER` inside an installed package, or {config: {...}}"
    )
    tokenizer: str | None = Field(None, description="hub id or folder; null: the model's own")

    data: str | None = Field(None, description="hub id of a data set, or `embedded:digits`")
    data_name: str | None = Field(None, description="configuration of the hub data set, such as cola")
    data_dir: str | None = Field(None, description="local folder or file; wins over `data`")
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of the training examples set aside for evaluation where there is no such split",
    )
    train_split: str | None = Field(None, description="null: train")
    eval_split: str | None = Field(None, description="null: validation, validation_matched, dev, val or test")
    max_train_examples: Count | None = None
    max_eval_examples: Count | None = None
    num_workers: Annotated[int, Field(ge=0)] = Field(0, description="processes per rank that prepare batches")

    max_steps: Count | None = Field(None, description="optimizer steps; wins over `epochs`")
    epochs: Positive | None = None
    train_batch_size: Count = Field(32, description="examples per optimizer step over all ranks")
    micro_batch_size: Count | None = Field(
        None, description="examples per forward and rank; null: no accumulation"
    )
    eval_batch_size: Count | None = Field(
        None, description="examples per forward and rank; null: the micro batch"
    )

    lr: Positive = 5e-5
    betas: list[Share] = Field([0.9, 0.999], min_length=2, max_length=2)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.01, description="not applied to biases and norms"
    )
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="wins over `warmup_ratio`")
    warmup_ratio: Share = 0.0
    gradient_clipping: Positive | None = Field(None, description="largest norm of the whole gradient")

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    lora: LoraOptions | None = None

    eval_steps: Count | None = Field(
        None, description="evaluate every this many steps; null: at the end only"
    )
    save_steps: Count | None = Field(
        None, description="checkpoint every this many steps; null: at the end only"
    )
    best_metric: str | None = Field(
        None, description="keep the model with the best of this metric; null: the task's"
    )
    keep_last: Count = Field(
        1, description="checkpoints kept; that of the best evaluation stays beyond these"
    )
    save_model: bool = Field(True, description="write the trained (and the best) model for transformers")
    resume: str = Field("auto", description="auto, none, or the output_dir of the run to go on with")
    output_dir: str | None = Field(
        None, description="null: outputs/NAME, or the next free outputs/NAME-2, -3, ..."
    )
    report_to: Annotated[list[Literal["tensorboard", "wandb", "csv"]], BeforeValidator(_backends)] | None = (
        Field(
            None,
            description="tensorboard, wandb, csv, a list of these, or none; null: the JSON's monitor blocks",
        )
    )
    logging_steps: Count = Field(10, description="steps between two logs of `report_to`")
    track_memory: Count | None = Field(
        None,
        description="number of a step whose memory is tracked by kind, activations too; that step is slow",
    )

    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="what to do when the loss or a gradient is NaN or infinite; such a step changes nothing",
    )
    max_nonfinite: Count = Field(
        10, description="skipped steps in a row after which the run stops all the same"
    )
    rank_timeout: Annotated[float, Field(ge=1, le=86400)] = Field(
        60.0, description="seconds without a sign of life after which a rank counts as lost"
    )

    deepspeed: Annotated[Any, BeforeValidator(_path_or_mapping)] = Field(
        None, description="a DeepSpeed JSON file, or its content as a mapping; null: ZeRO stage 0"
    )
    slimfit: dict[str, Any] | None = Field(
        None,
        description="laid over the JSON's own slimfit block; an explicit null is plain full fine-tuning by DeepSpeed",
    )


@dataclass(frozen=True)
class Draft:
    """A recipe as far as it could be read.

    Args:
        recipe: the recipe; fields named in `broken` hold a placeholder.
        name: stem of the recipe file; names the output folder.
        folder: folder of the recipe file; relative paths of JSON files are also looked up from there.
        broken: top-level fields that are wrong.
        problems: a line for each mistake.
    """

    recipe: Recipe
    name: str = "run"
    folder: Path | None = None
    broken: frozenset[str] = frozenset()
    problems: tuple[str, ...] = field(default=())


class _Loader(yaml.SafeLoader):
    """YAML with the floats of YAML 1.2: `8e-5` is a number, not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Draft:
    """The draft of a recipe file with overrides laid over it.

    Args:
        path: the YAML file; None starts from an empty recipe.
        overrides: `key=value` texts; dots in a key descend into mappings, the value is read as YAML.

    Raises:
        ConfigError: the file cannot be read as a mapping at all.
    """
    values = _load_file(Path(path)) if path is not None else {}
    problems: list[str] = []
    for text in overrides:
        problem = _override(values, text)
        if problem:
            problems.append(problem)
    recipe, broken, found = _validate(values)
    return Draft(
        recipe=recipe,
        name=Path(path).stem if path is not None else "run",
        folder=Path(path).resolve().parent if path is not None else None,
        broken=frozenset(broken),
        problems=tuple(problems + found),
    )


def _load_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            [f"--config: cannot read {str(path)!r} ({error}); name an existing YAML file"]
        ) from None
    try:
        values = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise ConfigError([f"--config: {str(path)!r} is not valid YAML ({where})"]) from None
    if not isinstance(values, dict):
        raise ConfigError(
            [f"--config: {str(path)!r} must hold a mapping of keys to values, got {values!r:.80}"]
        )
    return values


def _override(values: dict[str, Any], text: str) -> str | None:
    """Lay one `key=value` over `values` in place; the problem with it, if there is one."""
    key, equals, raw = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        return (
            f"override {text!r} must be written key=value, such as max_steps=60 or slimfit.freeze.rate=0.95"
        )
    try:
        value = yaml.load(raw, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return f"override {key}: the value must be YAML, got {raw!r}"
    target = values
    for part in parts[:-1]:
        # A null block (`slimfit: null`) or a short form (`task: causal_lm`) opens up for its inner keys.
        inner = target.get(part)
        if target is values and part == "task" and isinstance(inner, str):
            inner = {"name": inner}
        inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            return f"override {key}: {part} is {inner!r}, which has no inner keys"
        target[part] = dict(inner)
        target = target[part]
    target[parts[-1]] = value
    return None


def _validate(values: dict[Any, Any]) -> tuple[Recipe, set[str], list[str]]:
    """The recipe with placeholders for broken fields, those fields, and a line for each mistake."""
    stray = [key for key in values if not _is_word(key)]
    problems = [f"{key!r} is not a known key; keys are words" for key in stray]
    values = {key: value for key, value in values.items() if _is_word(key)}
    try:
        return Recipe.model_validate(values), set(), problems
    except ValidationError as error:
        problems += describe_validation_error(error, Recipe)
        broken = {str(item["loc"][0]) for item in error.errors() if item["loc"]}
    sound = {key: value for key, value in values.items() if key not in broken}
    recipe = Recipe.model_validate({"task": {}, "model": "", **sound})
    return recipe, broken & set(Recipe.model_fields), problems


def _is_word(key: Any) -> bool:
    """Whether a key can be the name of a field at all; JSON can smuggle in halves of characters."""
    try:
        return isinstance(key, str) and bool(key.encode())
    except UnicodeEncodeError:
        return False
