"""The registry of tasks: a name and where its class stands; the class is imported when it is asked for."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from slimfit_ds.errors import ConfigError, describe_validation_error
from slimfit_ds.training.tasks.base import Preprocessing, Splits, Task, TaskOptions

__all__ = ["TASKS", "Preprocessing", "Splits", "Task", "TaskOptions", "make_task"]

TASKS = {
    "sequence_classification": "sequence_classification:SequenceClassification",
    "sequence_regression": "sequence_regression:SequenceRegression",
    "question_answering": "question_answering:QuestionAnswering",
    "image_classification": "image_classification:ImageClassification",
    "causal_lm": "causal_lm:CausalLanguageModelling",
}


def make_task(block: dict[str, Any]) -> Task[Any]:
    """The task that a recipe's `task` block describes.

    Args:
        block: `name` and the options of that task.

    Raises:
        ConfigError: the name is unknown, or options are wrong.
    """
    options = dict(block)
    name = options.pop("name", None)
    if name not in TASKS:
        near = difflib.get_close_matches(str(name), TASKS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known tasks: {', '.join(TASKS)}"
        raise ConfigError([f"task.name {name!r} is not a known task; {hint}"])
    module, _, class_name = TASKS[name].partition(":")
    task_class: type[Task[Any]] = getattr(import_module(f"{__name__}.{module}"), class_name)
    try:
        return task_class(task_class.options_class.model_validate(options))
    except ValidationError as error:
        raise ConfigError(describe_validation_error(error, task_class.options_class, "task")) from None
