"""What the text tasks share: the tokenizer and its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from slimfit_ds.errors import ConfigError
from slimfit_ds.tasks.base import Task, TaskOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

__all__ = ["TextOptions", "TextTask", "load_tokenizer", "map_rows"]


class TextOptions(TaskOptions):
    """Options of the tasks that tokenise by themselves."""

    max_length: int = Field(128, ge=8, description="tokens of an example at most; longer ones are cut")


Options = TypeVar("Options", bound=TaskOptions)


class TextTask(Task[Options]):
    """A task over text; the tokenizer is set by `load_preprocessing`."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    """Tokens of an example at most."""

    def default_arguments(self) -> dict[str, Any]:
        return {"include_num_input_tokens_seen": "non_padding"}  # for tokens per second

    def model_problems(self, config: PretrainedConfig) -> list[str]:
        text = config.get_text_config()
        longest = getattr(text, "max_position_embeddings", None)
        if longest is not None and self.max_length is not None:
            padding = getattr(text, "pad_token_id", None) or 0
            if longest - padding - 1 < self.max_length <= longest:
                longest = min(longest, _positions(self.auto_class, config) or longest)
        if longest is not None and self.max_length is not None and self.max_length > longest:
            key = "max_length" if self.loss_counts_tokens else "task.max_length"
            return [f"{key} must be at most the model's {longest} positions, got {self.max_length}"]
        return []

    def load_preprocessing(self, source: str | None, config: PretrainedConfig) -> None:
        if source is None:
            raise ConfigError(
                ["tokenizer: a model that is initialised from a config needs one; name a folder or hub id"]
            )
        self.tokenizer = load_tokenizer(source)
        text = config.get_text_config()
        vocabulary = getattr(text, "vocab_size", None)
        if vocabulary is not None and len(self.tokenizer) > vocabulary:
            raise ConfigError(
                [
                    f"tokenizer: {source!r} has {len(self.tokenizer)} tokens, more than the model's vocab_size "
                    f"{vocabulary}; use the model's own tokenizer"
                ]
            )
        if getattr(text, "pad_token_id", None) != self.tokenizer.pad_token_id:
            # A decoder with a classification head looks for the last token that is no padding.
            text.pad_token_id = config.pad_token_id = self.tokenizer.pad_token_id


def _positions(auto_class: str, config: PretrainedConfig) -> int | None:
    """Tokens that a learned table of positions holds, of models that count from behind the padding's place (RoBERTa, MPNet).

    None: the model has no such table. Looks at the model itself, made without memory for its weights.
    """
    import torch
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, auto_class).from_config(config)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return None


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """A fast tokenizer with a padding token.

    Args:
        source: hub id or folder, or the path of a GGUF file.

    Raises:
        ConfigError: there is none at `source`.
    """
    from transformers import AutoTokenizer

    from slimfit_ds.tasks.models import place_of

    try:
        tokenizer = AutoTokenizer.from_pretrained(**place_of(source), use_fast=True)
    except Exception as error:  # the many ways a tokenizer folder can be wrong
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError([f"tokenizer: cannot load one from {source!r} ({reason})"]) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ConfigError([f"tokenizer: {source!r} has neither a padding nor an end token; choose another"])
    return tokenizer


def map_rows(split: Dataset, function: Any, key: str = "", **more: Any) -> Dataset:
    """`split.map` over batches; kept in memory, so that ranks share no cache file on disk.

    Args:
        split: the rows.
        function: takes and returns columns.
        key: what `function` depends on. With the rows it makes the fingerprint of the result, by which TRL finds log
            probabilities of an earlier run again.
    """
    from datasets.fingerprint import Hasher

    return split.map(
        function,
        batched=True,
        remove_columns=split.column_names,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=Hasher.hash([split._fingerprint, key]),
        **more,
    )
