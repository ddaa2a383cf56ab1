"""Causal language modelling: plain text in blocks, or chat and instruction rows with loss on the answers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from slimfit_ds.errors import ConfigError
from slimfit_ds.training.tasks.base import Rows, Splits
from slimfit_ds.training.tasks.chat_text import LAYOUTS, messages_of, render
from slimfit_ds.training.tasks.text import TextOptions, TextTask

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

__all__ = ["CausalLanguageModelling", "LanguageOptions"]

IGNORED = -100


class LanguageOptions(TextOptions):
    """Options of language modelling."""

    max_length: int = Field(
        1024, ge=8, description="tokens of a block of plain text, or of a conversation at most"
    )
    columns: list[str] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="null: recognised (messages, instruction + output, prompt + completion, text)",
    )


class CausalLanguageModelling(TextTask[LanguageOptions]):
    """The next token."""

    name = "causal_lm"
    model_class = "AutoModelForCausalLM"
    best_metric = "loss"
    options_class = LanguageOptions
    rows_are_examples = False
    layout: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        return len(self.layout) == 2 or self.layout in LAYOUTS

    def study(self, splits: Splits) -> Splits:
        shared = [name for name in splits.train.column_names if name in splits.evaluation.column_names]
        wanted = self.options.columns
        layouts = [tuple(wanted)] if wanted else [*LAYOUTS, ("text",)]
        found = next((layout for layout in layouts if all(name in shared for name in layout)), None)
        if found is None:
            looked_for = " or ".join(" + ".join(layout) for layout in layouts)
            raise ConfigError(
                [f"task.columns: no {looked_for} in both splits; they share {', '.join(shared)}"]
            )
        self.layout = found
        if self.is_chat:
            try:
                for split in (splits.train, splits.evaluation):
                    messages_of(split[0], self.layout)
            except ValueError as error:
                raise ConfigError([f"task.columns: {error}"]) from None
        return splits

    def metric_names(self) -> tuple[str, ...]:
        return ("loss", "perplexity", "token_accuracy")

    def model_values(self) -> dict[str, Any]:
        return {"use_cache": False}

    def model_problems(self, config: PretrainedConfig) -> list[str]:
        problems = super().model_problems(config)
        if getattr(config, "is_encoder_decoder", False):
            problems.append(f"model: {config.model_type!r} is an encoder-decoder; causal_lm needs a decoder")
        return problems

    def prepare(self, split: Dataset, *, training: bool) -> Dataset:
        prepared = self.tokenise(split, self._conversations if self.is_chat else self._blocks)
        if len(prepared) == 0:
            raise ConfigError(
                [
                    f"task.max_length: no example of {self.options.max_length} tokens with something to learn is left; "
                    "give more text or a smaller max_length"
                ]
            )
        return prepared

    def _blocks(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Texts one after the other, each closed by an end token, in blocks of `max_length`; the rest is dropped."""
        end = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        encoded = self.tokenizer([str(text) for text in batch[self.layout[0]]], add_special_tokens=True)[
            "input_ids"
        ]
        stream = [token for tokens in encoded for token in [*tokens, *end]]
        size = self.options.max_length
        blocks = [stream[start : start + size] for start in range(0, len(stream) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    def _conversations(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        """One row for each conversation; those whose answers all lie behind `max_length` are dropped."""
        columns = list(batch)
        all_tokens, all_labels = [], []
        for values in zip(*(batch[column] for column in columns), strict=True):
            text, stretches = render(
                self.tokenizer, messages_of(dict(zip(columns, values, strict=True)), self.layout)
            )
            encoded = self.tokenizer(
                text,
                add_special_tokens=False,
                truncation=True,
                max_length=self.options.max_length,
                return_offsets_mapping=True,
            )
            labels = [
                token if any(start < last and first < end for start, end in stretches) else IGNORED
                for token, (first, last) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
            ]
            # The first token is predicted from nothing, so it never counts.
            if any(label != IGNORED for label in labels[1:]):
                all_tokens.append(encoded["input_ids"])
                all_labels.append(labels)
        return {"input_ids": all_tokens, "labels": all_labels}

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = self.pad(examples, ["input_ids", "labels"])
        lengths = torch.tensor([[len(row["input_ids"])] for row in examples])
        positions = torch.arange(batch["input_ids"].shape[1])[None]
        return {**batch, "attention_mask": (positions < lengths).long()}

    def loss_terms(self, prepared: Dataset) -> np.ndarray | None:
        return np.array([sum(label != IGNORED for label in labels[1:]) for labels in prepared[:]["labels"]])

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        targets = batch["labels"][:, 1:]
        counted = targets != IGNORED
        # One example at a time: float32 logits of a whole batch would be the largest tensor of the run.
        losses, hits = [], []
        for logits, target, mask in zip(outputs.logits[:, :-1], targets, counted, strict=True):
            kept, wanted = logits[mask].float(), target[mask]
            losses.append(cross_entropy(kept, wanted, reduction="sum"))
            hits.append((kept.argmax(dim=-1) == wanted).sum())
        return {"loss": torch.stack(losses), "hits": torch.stack(hits), "terms": counted.sum(dim=1)}

    def score(self, rows: Rows, prepared: Dataset, original: Dataset) -> dict[str, float]:
        terms = int(rows["terms"].sum())
        loss = float(rows["loss"].astype(np.float64).sum() / terms)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": float(rows["hits"].sum() / terms),
        }
