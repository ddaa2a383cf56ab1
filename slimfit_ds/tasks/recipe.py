"""A recipe: one YAML file in the field names of the Trainer's arguments, plus model, data, task and slimfit.

    recipe = read_recipe(["--config", "recipes/minilm_cola.yaml", "--learning_rate", "1e-4", "slimfit.freeze.rate=0.95"])

Everything that is not a field of `Recipe` belongs to the arguments class of the task: `TrainingArguments`, TRL's
`SFTConfig` or `DPOConfig`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from slimfit_ds.errors import ConfigError, describe_validation_error
from slimfit_ds.tasks import TASKS, make_task, task_class
from slimfit_ds.tasks.base import Task

__all__ = ["LoraOptions", "Recipe", "read_recipe"]

Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

OLD_KEYS = {
    "lr": "learning_rate",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "epochs": "num_train_epochs",
    "train_batch_size": "per_device_train_batch_size (examples of one rank and forward pass) and "
    "gradient_accumulation_steps",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps (below 1 it is a share of all steps)",
    "gradient_clipping": "max_grad_norm",
    "dtype": "bf16: true, fp16: true, or neither",
    "num_workers": "dataloader_num_workers",
    "best_metric": "metric_for_best_model, with load_best_model_at_end: true",
    "keep_last": "save_total_limit",
    "save_model": "export",
    "resume": "resume_from_checkpoint",
    "rank_timeout": "ddp_timeout",
    "track_memory": "measure: {tracked: 1}",
}
"""Keys of recipes before the Trainer was the loop, and what to write now."""


class _Strict(BaseModel):
    # strict: `max_steps: true` or `learning_rate: fast` is a mistake to report, not something to convert.
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), arbitrary_types_allowed=True
    )


class ModelFromConfig(_Strict):
    """A model that is initialised instead of loaded."""

    config: dict[str, Any] = Field(description="a transformers configuration with its `model_type`")


class LoraOptions(_Strict):
    """Low-rank adapters by PEFT: a rival of freezing, offered for comparisons."""

    r: Count = Field(8, description="rank of the adapters")
    alpha: Annotated[float, Field(gt=0)] = Field(16.0, description="scale of the adapters, divided by r")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: list[str] | str = Field("all-linear", description="names of the adapted linear layers")

    @model_validator(mode="after")
    def _needs_peft(self) -> LoraOptions:
        if find_spec("peft") is None:
            raise ValueError("adapters need peft: pip install 'slimfit_ds[lora]'")
        return self


class MeasureOptions(_Strict):
    """Which steps of a run are measured, and how: `measures.json` in the output folder."""

    warmup: Annotated[int, Field(ge=0)] = Field(
        2, description="first steps that count neither for the time nor for the bytes sent"
    )
    tracked: Count = Field(3, description="last steps whose memory is tracked by kind; such a step is slow")


class Recipe(_Strict):
    """What a run needs beside the Trainer's arguments.

    `read_recipe` returns a subclass that also has the fields of the task's arguments class.
    """

    task: Annotated[dict[str, Any], BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)] = (
        Field(description="name of the task, or a mapping with `name` and the task's own options")
    )
    model: Annotated[
        str | ModelFromConfig,
        # By hand: a union would report each mistake once for every branch.
        BeforeValidator(lambda v: ModelFromConfig.model_validate(v) if isinstance(v, dict) else v),
    ] = Field(description="hub id, folder, `package:NAME/FOLDER` of an installed package, or {config: {...}}")
    tokenizer: str | None = Field(None, description="hub id or folder; null: the model's own")

    attn_implementation: (
        Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"] | None
    ) = Field(
        None,
        description="the model's attention; null: transformers' choice. Long packed rows need flash attention",
    )

    data: str | None = Field(None, description="hub id of a data set, or `embedded:digits`")
    data_name: str | None = Field(None, description="configuration of the hub data set, such as cola")
    data_dir: str | None = Field(
        None, description="folder or file (parquet, json, csv, images); wins over `data`"
    )
    train_split: str | None = Field(None, description="null: train")
    eval_split: str | None = Field(None, description="null: validation, validation_matched, dev, val or test")
    holdout: Share | None = Field(
        None, description="share of the training rows set aside where there is no split to evaluate on"
    )
    max_train_examples: Count | None = None
    max_eval_examples: Count | None = None

    slimfit: dict[str, Any] | None = Field(
        None,
        description="laid over the slimfit block of the `deepspeed` JSON; null: plain full fine-tuning",
    )
    deepspeed: dict[str, Any] | str | None = Field(
        None, description="a DeepSpeed JSON file or its content; null: the Trainer's own loop"
    )
    lora: LoraOptions | None = None
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="what to do when a loss or gradient is NaN or infinite; such a step changes nothing",
    )
    max_nonfinite: Count = Field(
        10, description="skipped steps in a row after which the run stops all the same"
    )
    export: bool = Field(True, description="write the trained model to output_dir/model")
    measure: MeasureOptions | None = Field(
        None, description="memory, bytes sent and seconds of the steps, as `slimfit-ds compare` asks for them"
    )

    @property
    def arguments(self) -> dict[str, Any]:
        """The values of the recipe that belong to the Trainer's arguments."""
        return {
            key: value
            for key, value in self.model_dump(exclude_unset=True).items()
            if key not in Recipe.model_fields
        }


def read_recipe(argv: Sequence[str], problems: list[str] | None = None) -> tuple[Recipe, Task[Any]]:
    """The recipe and the task that a command line names.

    Args:
        argv: `--config FILE`, and overrides as `--key value` or `key=value`; dots descend into mappings.
        problems: takes the lines of wrong keys and values, so that the rest of the recipe can be looked at before the
            user hears of all problems at once; None: they are raised.

    Raises:
        ConfigError: all problems, where no recipe can be made without the wrong keys.
    """
    values: dict[str, Any] = {}
    collected, problems = problems is not None, [] if problems is None else problems
    for key, text in _pairs(argv, problems):
        if key == "config":
            values = {"output_dir": f"outputs/{Path(text).stem}", **_load_file(Path(text))}
            _find_json(values, Path(text).resolve().parent)
        elif (
            key != "local_rank"
        ):  # the deepspeed launcher hands it to every script; the environment says the same
            _override(values, key, text, problems)
    values.setdefault("output_dir", "outputs/run")
    old = {key for key in values if key in OLD_KEYS}
    problems += [f"{key} is now {OLD_KEYS[key]}" for key in sorted(old)]
    block = values.get("task")
    name = block.get("name") if isinstance(block, dict) else block
    task = None
    if block is not None:
        try:
            task = make_task(block)
        except ConfigError as error:
            problems += error.problems
    model = _recipe_class(str(name) if name in TASKS else "sequence_classification")
    wrong: set[Any] = set()
    try:
        recipe = model.model_validate({key: value for key, value in values.items() if key not in old})
    except ValidationError as error:
        problems += describe_validation_error(error, model)
        wrong = {item["loc"][0] for item in error.errors()}
        recipe = None
        if not wrong & Recipe.model_fields.keys():
            rest = {key: value for key, value in values.items() if key not in old | wrong}
            recipe = model.model_validate(rest)
    if recipe is None or task is None or (problems and not collected):
        raise ConfigError(problems)
    return recipe, task


@cache
def _recipe_class(task: str) -> type[Recipe]:
    """`Recipe` with the fields of the task's arguments class, so that types and names are checked in one go."""
    arguments = task_class(task).arguments_class()
    hints = get_type_hints(arguments)
    own: dict[str, Any] = {
        field.name: (hints[field.name], None)
        for field in fields(arguments)
        if field.init and field.name not in Recipe.model_fields
    }
    own["resume_from_checkpoint"] = (bool | str | None, None)
    return create_model("Recipe", __base__=Recipe, **own)


class _Loader(yaml.SafeLoader):
    """YAML with the floats and booleans of YAML 1.2: `8e-5` is a number, and the `no` of `eval_strategy: no` a word."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _load_file(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError([f"--config: cannot read {str(path)!r} as YAML ({reason})"]) from None
    if not isinstance(values, dict):
        raise ConfigError([f"--config: {str(path)!r} must hold keys and values, got {values!r:.80}"])
    return values


def _find_json(values: dict[str, Any], folder: Path) -> None:
    """Look up the DeepSpeed JSON of a recipe from the working directory, then from the recipe's folder and its parent."""
    name = values.get("deepspeed")
    if isinstance(name, str) and not Path(name).is_file():
        found = next((place / name for place in (folder, folder.parent) if (place / name).is_file()), None)
        values["deepspeed"] = str(found or name)


def _pairs(argv: Sequence[str], problems: list[str]) -> list[tuple[str, str]]:
    """Keys and texts of `--key value`, `--key=value`, `--switch` and `key=value`; `--config` first."""
    pairs: list[tuple[str, str]] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        flag = word.startswith("--")
        key, equals, text = word.removeprefix("--").partition("=")
        if flag and not equals:
            text = words.pop(0) if words and not _starts_a_pair(words[0]) else "true"
        elif not equals:
            problems.append(
                f"{word!r} must be written --key value or key=value, such as --max_steps 60 or slimfit.freeze.rate=0.95"
            )
            continue
        pairs.append((key.replace("-", "_"), text))
    if not any(key == "config" for key, _ in pairs):
        problems.append("--config: name a recipe, such as --config recipes/digits_vit.yaml")
    return sorted(pairs, key=lambda pair: pair[0] != "config")


def _starts_a_pair(word: str) -> bool:
    return word.startswith("--") or re.match(r"[A-Za-z_][\w.]*=", word) is not None


def _override(values: dict[str, Any], key: str, text: str, problems: list[str]) -> None:
    """Lay one value over `values` in place."""
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        problems.append(f"{key}: the value must be YAML, got {text!r}")
        return
    *outer, last = key.split(".")
    place = values
    for part in outer:
        inner = place.get(part)
        if inner is None or (part == "task" and isinstance(inner, str)):
            inner = {"name": inner} if inner else {}
        if not isinstance(inner, dict):
            problems.append(f"{key}: {part} is {inner!r}, not a mapping")
            return
        # A copy: the value may stand in several places by a YAML anchor.
        place[part] = place = dict(inner)
    place[last] = value
