"""Tasks: data columns -> the Trainer class, its data sets and its metrics. A task is one small file and one line here."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from slimfit_ds.errors import ConfigError, describe_validation_error
from slimfit_ds.tasks.base import Splits, Task, TaskOptions

__all__ = ["TASKS", "Splits", "Task", "TaskOptions", "make_task", "task_class"]

TASKS = {
    "sequence_classification": "sequences:SequenceClassification",
    "sequence_regression": "sequences:SequenceRegression",
    "question_answering": "question_answering:QuestionAnswering",
    "image_classification": "image_classification:ImageClassification",
    "causal_lm": "language:CausalLanguageModelling",
    "dpo": "language:PreferenceOptimisation",
}


def task_class(name: str) -> type[Task[Any]]:
    """The class of a task.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known tasks: {', '.join(TASKS)}"
        raise ConfigError([f"task.name {name!r} is not a known task; {hint}"])
    module, _, class_name = TASKS[name].partition(":")
    return getattr(import_module(f"{__name__}.{module}"), class_name)


def make_task(block: dict[str, Any] | str) -> Task[Any]:
    """The task that the `task` key of a recipe describes.

    Args:
        block: the name, or a mapping with `name` and the options of that task.

    Raises:
        ConfigError: the name is unknown, or options are wrong.
    """
    options = dict(block) if isinstance(block, dict) else {"name": block}
    kind = task_class(str(options.pop("name", None)))
    if kind.loss_counts_tokens and "max_length" in options:
        raise ConfigError(["task.max_length is now max_length, a key of the recipe beside task"])
    try:
        return kind(kind.options_class.model_validate(options))
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, kind.options_class, "task")) from None
