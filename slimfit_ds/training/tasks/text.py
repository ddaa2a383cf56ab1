"""What the text tasks share: the columns that hold the text, the tokenizer, padding of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.tasks.base import Preprocessing, Splits, Task, TaskOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["TEXT_LAYOUTS", "PairOptions", "TextOptions", "TextTask", "find_text_columns", "load_tokenizer"]

TEXT_LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),  # MRPC, RTE, STS-B, WNLI
    ("question1", "question2"),  # QQP
    ("question", "sentence"),  # QNLI
    ("premise", "hypothesis"),  # MNLI, AX
    ("sentence",),  # CoLA, SST-2
    ("text", "text_pair"),
    ("text",),
)
"""Names of the text columns, tried in this order."""


class TextOptions(TaskOptions):
    """Options of the tasks that read text."""

    max_length: int = Field(128, ge=8, description="tokens of an example at most; longer ones are cut")


class PairOptions(TextOptions):
    """Options of the tasks that label a text or a pair of texts."""

    columns: list[str] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="the one or two text columns; null: recognised by their names",
    )
    label_column: str = "label"


def find_text_columns(splits: Splits, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The one or two columns that hold the text.

    Raises:
        ConfigError: a wanted column is not there, or no known layout fits.
    """
    shared = [name for name in splits.train.column_names if name in splits.evaluation.column_names]
    if wanted is not None:
        absent = [name for name in wanted if name not in shared]
        if absent:
            raise ConfigError(
                [
                    f"task.columns: no column {name!r} in both splits; they share {', '.join(shared)}"
                    for name in absent
                ]
            )
        return tuple(wanted)
    for layout in TEXT_LAYOUTS:
        if all(name in shared for name in layout):
            return layout
    raise ConfigError(
        [
            f"task.columns: no known text columns among {', '.join(shared)}; name one or two of them in task.columns"
        ]
    )


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer with a padding token.

    Raises:
        ConfigError: there is none at `source`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except Exception as error:  # the many ways a tokenizer folder can be wrong
        raise ConfigError([f"tokenizer: cannot load one from {source!r} ({_first_line(error)})"]) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError([f"tokenizer: {source!r} has neither a padding nor an end token; choose another"])
    return tokenizer


Options = TypeVar("Options", bound=TextOptions)


class TextTask(Task[Options]):
    """A task that tokenises; the tokenizer is set by `load_preprocessing`."""

    tokenizer: PreTrainedTokenizerBase

    def load_preprocessing(self, source: Preprocessing, config: PretrainedConfig) -> None:
        if source.source is None:
            raise ConfigError(
                ["tokenizer: a model that is initialised from a config needs one; name a folder or hub id"]
            )
        self.tokenizer = load_tokenizer(source.source)
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        if vocabulary is not None and len(self.tokenizer) > vocabulary:
            raise ConfigError(
                [
                    f"tokenizer: {source.source!r} has {len(self.tokenizer)} tokens, more than the model's "
                    f"vocab_size {vocabulary}; use the model's own tokenizer"
                ]
            )

    def save_preprocessing(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)

    def model_problems(self, config: PretrainedConfig) -> list[str]:
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and self.options.max_length > longest:
            return [
                f"task.max_length must be at most the model's {longest} positions, got {self.options.max_length}"
            ]
        return []

    def tokenise(self, split: Dataset, function: Any) -> Dataset:
        """`split.map` over batches; kept in memory, so that ranks share no cache file on disk."""
        return split.map(
            function,
            batched=True,
            remove_columns=split.column_names,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint="in_memory",
        )

    def pad(
        self, examples: Sequence[Mapping[str, Any]], keys: Sequence[str], length: int | None = None
    ) -> dict[str, Tensor]:
        """`[batch, seq]` int64 tensors of the named token columns, padded on the right.

        Args:
            examples: rows with lists of equal length under `keys`.
            keys: among input_ids, token_type_ids, attention_mask, labels.
            length: pad to this many tokens; None: to the longest example.
        """
        fill = {"input_ids": self.tokenizer.pad_token_id, "labels": -100}
        longest = length or max(len(example[keys[0]]) for example in examples)
        return {
            key: torch.tensor(
                [list(row[key]) + [fill.get(key, 0)] * (longest - len(row[key])) for row in examples],
                dtype=torch.int64,
            )
            for key in keys
        }

    def token_keys(self) -> list[str]:
        """The token columns that this model's forward takes."""
        return [
            key
            for key in self.tokenizer.model_input_names
            if key in {"input_ids", "token_type_ids", "attention_mask"}
        ]


class PairTask(TextTask[PairOptions]):
    """A task over one text or a pair of texts with one label."""

    options_class = PairOptions
    columns: tuple[str, ...] = ()

    def _tokens(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        texts = [[str(text) for text in batch[column]] for column in self.columns]
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.options.max_length)
        return {key: encoded[key] for key in self.token_keys()}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
