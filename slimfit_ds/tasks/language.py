"""Language models: plain text, chat and instructions by TRL's SFTTrainer, preferences by its DPOTrainer.

Packing, chat templates, the loss on answers only and truncation are TRL's (`packing`, `assistant_only_loss`,
`completion_only_loss`, `max_length` of the recipe). Here the columns of a data set become those that TRL reads.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.base import Splits, TaskOptions
from slimfit_ds.tasks.text import TextTask, map_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, Trainer

__all__ = ["CausalLanguageModelling", "LanguageOptions", "PreferenceOptimisation", "PreferenceOptions"]

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + eos_token }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""Used for tokenizers that bring no chat template; it marks what the assistant says."""

LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("prompt", "response"),
    ("text",),
)
"""Columns of text data, tried in this order; `instruction` may come with `input`."""

_ROW = "slimfit_row"
"""Column with the number of each row, by which those are found that TRL leaves out."""

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class LanguageOptions(TaskOptions):
    """Options of language modelling."""

    columns: list[str] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="question and answer, or one column of text or turns; null: recognised by name",
    )


class PreferenceOptions(LanguageOptions):
    """Options of preference optimisation."""

    wrong_answers: Literal["number", "other"] = Field(
        "number",
        description="rejected answers for data without any: the answer with another last number, or that of the next row",
    )


class _LanguageTask(TextTask[Any]):
    auto_class = "AutoModelForCausalLM"
    loss_counts_tokens = True
    layout: tuple[str, ...] = ()
    _given: Splits
    layouts: tuple[tuple[str, ...], ...] = LAYOUTS

    def take_arguments(self, values: Mapping[str, Any]) -> None:
        self.max_length = values.get("max_length", 1024)  # TRL's own default

    def study(self, splits: Splits) -> Splits:
        wanted = self.options.columns
        layouts = [tuple(wanted)] if wanted else self.layouts
        found = next((layout for layout in layouts if set(layout) <= set(splits.shared)), None)
        if found is None:
            looked_for = " or ".join(" + ".join(layout) for layout in layouts)
            raise ConfigError(
                [f"task.columns: no {looked_for} in both splits; they share {', '.join(splits.shared)}"]
            )
        self.layout = found
        problems = splits.empty_cells("task.columns", found)
        for name, split in splits.named():
            try:
                self._convert(split.select([0])[:])
            except (TypeError, ValueError, AttributeError) as error:
                problems.append(f"task.columns: {' + '.join(found)} of split {name!r}: {error}")
        if problems:
            raise ConfigError(problems)
        return splits

    def model_problems(self, config: PretrainedConfig) -> list[str]:
        problems = super().model_problems(config)
        if getattr(config, "is_encoder_decoder", False):
            problems.append(
                f"model: {config.model_type!r} is an encoder-decoder; {self.name} needs a decoder"
            )
        return problems

    def load_preprocessing(self, source: str | None, config: PretrainedConfig) -> None:
        super().load_preprocessing(source, config)
        if self.tokenizer.eos_token is None:
            raise ConfigError(
                [f"tokenizer: {source!r} has no end token, so no answer could end; choose another"]
            )
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = PLAIN_TEMPLATE

    def _convert(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns as TRL reads them."""
        raise NotImplementedError

    def trainer_parts(self, splits: Splits) -> dict[str, Any]:
        def convert(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            made = self._convert(batch)
            return {**made, _ROW: [*range(len(next(iter(made.values()))))]}

        def columns(split: Dataset) -> Dataset:
            key = f"{self.name} {self.layout} {self.options!r}"
            return map_rows(split, convert, key, batch_size=None)

        problems, made = [], []
        for name, split in splits.named():
            try:
                made.append(columns(split))
                self._check_turns(made[-1])
            except ValueError as error:
                problems.append(f"task.columns: {' + '.join(self.layout)} of split {name!r}: {error}")
        if problems:
            raise ConfigError(problems)
        self._given = splits
        return {"train_dataset": made[0], "eval_dataset": made[1], "processing_class": self.tokenizer}

    def check_trainer(self, trainer: Trainer) -> None:
        """Name the rows that TRL has left out: `max_length` cuts off all of what they have to teach."""
        made: tuple[Any, Any] = (trainer.train_dataset, trainer.eval_dataset)
        problems = []
        for (name, split), prepared in zip(self._given.named(), made, strict=True):
            if prepared is None or _ROW not in prepared.column_names:
                continue  # packed rows are cut nowhere
            kept = set(prepared[_ROW])
            gone = [number for number in range(len(split)) if number not in kept]
            if not gone:
                continue
            rows = ", ".join(map(str, gone[:5])) + (", ..." if len(gone) > 5 else "")
            text = (
                f"max_length {self.max_length}: of {len(gone)} of {len(split)} rows of split {name!r} nothing is left to learn, as their "
                f"answers begin behind it (rows {rows}); raise it, or shorten what is asked"
            )
            if len(gone) == len(split):
                problems.append(text)
            elif trainer.is_world_process_zero():
                warnings.warn(f"{text}. These rows are left out", stacklevel=2)
        if problems:
            raise ConfigError(problems)

    def _check_turns(self, split: Dataset) -> None:
        """Whether the template takes every row: TRL would meet one that it refuses in the middle of its preparations."""
        refused = []
        for number, row in enumerate(split):
            try:
                for turns in _conversations(row):
                    self.tokenizer.apply_chat_template(turns, tokenize=False)
            except Exception as error:  # templates raise errors of their own
                refused.append(f"row {number}: {' '.join(str(error).split()):.120}")
        if refused:
            more = f" (and {len(refused) - 3} rows more)" if len(refused) > 3 else ""
            raise ValueError(
                f"{'; '.join(refused[:3])}{more}; change or remove what cannot be written as turns"
            )


class CausalLanguageModelling(_LanguageTask):
    """The next token, of plain text or of answers."""

    name = "causal_lm"
    options_class = LanguageOptions
    metrics = ("loss", "mean_token_accuracy", "entropy")

    @classmethod
    def arguments_class(cls) -> Any:
        from trl import SFTConfig

        return SFTConfig

    @classmethod
    def trainer_class(cls) -> Any:
        from trl import SFTTrainer

        return SFTTrainer

    def default_arguments(self) -> dict[str, Any]:
        # Rows of questions and answers have their loss on the answers by TRL's own default; turns are treated alike.
        return {
            **super().default_arguments(),
            "assistant_only_loss": self.layout in (("messages",), ("conversations",)),
        }

    def _convert(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        if self.layout == ("prompt", "completion"):
            return {name: _each(batch[name], _text_or_turns) for name in self.layout}
        if len(self.layout) == 2:
            return {"prompt": _asked(batch, self.layout[0]), "completion": _answered(batch[self.layout[1]])}
        column = batch[self.layout[0]]
        if isinstance(column[0], str):
            return {"text": column}
        return {"messages": _each(column, _conversation)}

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        return {**metrics, "eval_perplexity": math.exp(min(metrics["eval_loss"], 700.0))}


class PreferenceOptimisation(_LanguageTask):
    """A chosen answer against a rejected one."""

    name = "dpo"
    options_class = PreferenceOptions
    metrics = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    layouts = (("prompt", "chosen", "rejected"), ("chosen", "rejected"), ("question", "answer"))

    @classmethod
    def arguments_class(cls) -> Any:
        from trl import DPOConfig

        return DPOConfig

    @classmethod
    def trainer_class(cls) -> Any:
        from trl import DPOTrainer

        return DPOTrainer

    def _convert(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        if "chosen" in self.layout:
            return {name: _each(batch[name], _text_or_turns) for name in self.layout}
        answers = batch[self.layout[1]]
        wrong = (
            _other_numbers(answers) if self.options.wrong_answers == "number" else [*answers[1:], answers[0]]
        )
        return {
            "prompt": _asked(batch, self.layout[0]),
            "chosen": _answered(answers),
            "rejected": _answered(wrong),
        }


def _each(column: Sequence[Any], convert: Callable[[Any], Any]) -> list[Any]:
    """Convert the cells of a column; an error names the row."""
    made = []
    for number, cell in enumerate(column):
        try:
            made.append(convert(cell))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    return made


def _asked(batch: Mapping[str, list[Any]], column: str) -> list[list[dict[str, str]]]:
    """What the user says; an `instruction` is followed by its `input`, where there is one."""
    extra = batch.get("input") if column == "instruction" else None
    texts = (
        batch[column]
        if extra is None
        else [f"{text}\n\n{more}" if more else text for text, more in zip(batch[column], extra, strict=True)]
    )
    return _each(texts, lambda cell: _said(cell, "user"))


def _answered(texts: Sequence[Any]) -> list[list[dict[str, str]]]:
    return _each(texts, lambda cell: _said(cell, "assistant"))


def _said(cell: Any, role: str) -> list[dict[str, str]]:
    if isinstance(cell, str | int | float):
        return [{"role": role, "content": str(cell)}]
    return _turns(cell)


def _text_or_turns(cell: Any) -> Any:
    return cell if isinstance(cell, str) else _turns(cell)


def _conversations(row: Mapping[str, Any]) -> list[list[dict[str, str]]]:
    """The turns of a row as TRL reads it, one list for each answer; nothing for plain texts."""
    if "messages" in row:
        return [row["messages"]]
    asked = row.get("prompt", [])
    answers = [row[name] for name in ("completion", "chosen", "rejected") if isinstance(row.get(name), list)]
    return [(asked if isinstance(asked, list) else []) + answer for answer in answers]


def _other_numbers(answers: Sequence[str]) -> list[str]:
    """The same answers with another last number: a wrong solution that reads like the right one."""

    def change(answer: str) -> str:
        found = re.search(r"(\d[\d,]*)(?!.*\d)", answer, re.DOTALL)
        if found is None:
            raise ValueError(f"no number to change in {answer!r:.60}; set task.wrong_answers=other")
        number = int(found[1].replace(",", ""))
        return answer[: found.start()] + str(number + 1 + number // 10) + answer[found.end() :]

    return [change(answer) for answer in answers]


def _turns(turns: Any) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"must hold turns, got {turns!r:.60}")
    return [_turn(turn) for turn in turns]


def _conversation(turns: Any) -> list[dict[str, str]]:
    made = _turns(turns)
    if all(turn["role"] != "assistant" for turn in made):
        raise ValueError("has no turn of an assistant, so there is nothing to learn")
    return made


def _turn(turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a turn must have a role and a content, got {turn!r:.60}")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise ValueError(
            "a turn has tool calls, which are not supported: write them into its content as text"
        )
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role is None or content is None:
        raise ValueError(f"a turn must have a role and a content, got keys {', '.join(map(str, turn))}")
    return {"role": _ROLES.get(str(role), str(role)), "content": _text(content)}


def _text(content: Any) -> str:
    """A content: a text, or parts of which each is one."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a content must be a text or parts of text, got {content!r:.60}")
    return "".join(texts)
