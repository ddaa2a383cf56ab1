"""Words that were added to a vocabulary and that a split model will never learn."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.trainable.split import SplitModule
from slimfit_ds.trainable.units import full_shape, split_record

__all__ = ["warn_of_new_words"]


@torch.no_grad()
def warn_of_new_words(model: nn.Module, added: Mapping[str, int]) -> None:
    """Warn of added words whose vectors neither have been trained before nor train in this run.

    transformers gives new words the mean of all vectors, with next to no noise (`resize_token_embeddings`); words that were
    added before pretraining (`<|im_end|>`) look like any other.

    Args:
        model: split; of another one every vector may train.
        added: word -> id, from the tokenizer's `get_added_vocab()`.
    """
    record = split_record(model)
    find = getattr(model, "get_input_embeddings", None)
    module: Any = None if record is None or find is None else find()
    weight = module._parameters.get("weight") if isinstance(module, nn.Embedding) else None
    if record is None or weight is None or weight.shape != full_shape(weight):
        return
    first = 0
    if isinstance(module, SplitModule):
        first = len(weight) if module.split.rows is None else module.split.rows
    elif weight.requires_grad:
        return
    ids = {word: index for word, index in added.items() if first <= index < len(weight)}
    if not ids:
        return
    mean = weight.mean(0, dtype=torch.float32)
    some = weight[:: max(len(weight) // 1024, 1)]
    usual = _distances(some, mean).median()
    new = [
        word
        for word, far in zip(ids, _distances(weight[list(ids.values())], mean), strict=True)
        if far < usual / 10
    ]
    if new:
        name = next(n for n, m in model.named_modules() if m is module)
        warnings.warn(
            f"{len(new)} added tokens will not learn ({', '.join(new[:5])}{', ...' if len(new) > 5 else ''}): of the word "
            f"embedding {f'the first {first:,} words' if first else 'nothing'} trains under policy static; put "
            f"{name!r} into slimfit.freeze.always_active (lower the rate, if there is no room), or take policy: ils",
            stacklevel=2,
        )


def _distances(vectors: Tensor, mean: Tensor) -> Tensor:
    return (vectors.float() - mean).norm(dim=-1)
