"""The blocks of a model, read from the names of its layers: what policies that train whole blocks choose among."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slimfit_ds.trainable.layers import Layer

__all__ = ["Blocks", "find_blocks", "find_head"]


@dataclass(frozen=True)
class Blocks:
    """Positions of layers by where they stand in the model."""

    before: tuple[int, ...]
    """Embeddings: all layers in front of the first block."""
    blocks: tuple[tuple[int, ...], ...]
    """The layers of each block, in model order."""
    after: tuple[int, ...]
    """Final norm, pooler and head: all layers behind the last block, and those between blocks."""


def find_blocks(names: Sequence[str]) -> Blocks:
    """Group layers by the numbered list that most of them stand in (`encoder.layer.3.`, `model.layers.3.`).

    A model without such a list is one block for each layer.

    Args:
        names: of the layers, in model order.
    """
    prefixes = [_numbered_prefix(name) for name in names]
    lists = Counter(prefix[0] for prefix in prefixes if prefix is not None)
    if not lists:
        return Blocks((), tuple((layer,) for layer in range(len(names))), ())
    (stem, _), *_ = lists.most_common(1)
    members: dict[str, list[int]] = {}
    before: list[int] = []
    after: list[int] = []
    for layer, prefix in enumerate(prefixes):
        if prefix is not None and prefix[0] == stem:
            members.setdefault(prefix[1], []).append(layer)
        else:
            (after if members else before).append(layer)
    return Blocks(tuple(before), tuple(tuple(block) for block in members.values()), tuple(after))


def find_head(layers: Sequence[Layer]) -> int | None:
    """The task's head: the last linear layer behind the blocks, if it is no larger than the largest layer of a block.

    The output embedding of a language model is larger, and it is pretrained: not a head in this sense.

    Args:
        layers: of the model, in model order.
    """
    parts = find_blocks([layer.name for layer in layers])
    linear = [layer for layer in parts.after if layers[layer].kind == "linear"]
    largest = max((layers[layer].numel for block in parts.blocks for layer in block), default=0)
    return linear[-1] if linear and layers[linear[-1]].numel <= largest else None


def _numbered_prefix(name: str) -> tuple[str, str] | None:
    """The list that a name stands in and its number there: the outermost numbered part."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:position]), part
    return None
