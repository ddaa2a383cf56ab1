"""Words that were added to a vocabulary and that a split model will never learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from slimfit_ds.trainable.split import SplitModule
from slimfit_ds.trainable.units import full_shape, split_record

__all__ = ["warn_of_new_words"]


@torch.no_grad()
def warn_of_new_words(
    model: nn.Module, whole: Callable[[Tensor], AbstractContextManager[Any]] = lambda weight: nullcontext()
) -> None:
    """Warn of words whose vectors neither have been trained before nor train in this run.

    transformers gives new words the mean of all vectors, with next to no noise (`resize_token_embeddings`: 3e-5 of the usual
    distance from it). Words that were added before pretraining (`<|im_end|>`) look like any other: the nearest of
    SmolLM2's 49,152 stands at 0.73.

    Args:
        model: split; of another one every vector may train.
        whole: a context in which a weight that ZeRO 3 has cut is whole.
    """
    record = split_record(model)
    find = getattr(model, "get_input_embeddings", None)
    try:
        module: Any = None if record is None or find is None else find()
    except NotImplementedError:
        # transformers: a model without words, of sounds.
        return
    weight = module._parameters.get("weight") if isinstance(module, nn.Embedding) else None
    if weight is None:
        return
    first = 0
    if isinstance(module, SplitModule):
        first = full_shape(weight)[0] if module.split.rows is None else module.split.rows
    elif weight.requires_grad:
        return
    if first == full_shape(weight)[0] or weight.is_meta or isinstance(weight.data, FakeTensor):
        return
    with whole(weight):
        mean = weight.mean(0, dtype=torch.float32)
        usual = _distances(weight[:: max(len(weight) // 1024, 1)], mean).median()
        # A few words at a time: all of them in float32 may be gigabytes.
        near = torch.cat([_distances(part, mean) < usual / 1000 for part in weight[first:].split(4096)])
    new = [first + place for place in near.nonzero().flatten().tolist()]
    if new:
        name = next(n for n, m in model.named_modules() if m is module)
        warnings.warn(
            f"{len(new)} added tokens will not learn (ids {', '.join(map(str, new[:5]))}{', ...' if len(new) > 5 else ''}): of the "
            f"word embedding {f'the first {first:,} words' if first else 'nothing'} trains under policy static; put "
            f"{name!r} into slimfit.freeze.always_active (lower the rate, if there is no room), or take policy: ils",
            stacklevel=2,
        )


def _distances(vectors: Tensor, mean: Tensor) -> Tensor:
    return (vectors.float() - mean).norm(dim=-1)
