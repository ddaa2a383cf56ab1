"""Fine-tune a few whole blocks, chosen once; the others keep their pretrained weights.

Source: Sarkar et al., "Block Selective Reprogramming for On-device Training of Vision Transformers" (BSR),
arXiv 2405.10951, of which only the choice of blocks is taken up here (the paper drops tokens too). Blocks are ranked by
what their layers moved in a priming phase as in `far`; the head comes first.
"""

from __future__ import annotations

from slimfit_ds.schedule.policies.base import Policy, Selection, State
from slimfit_ds.schedule.policies.far import init, observe, primed, priming
from slimfit_ds.trainable.blocks import find_blocks

__all__ = ["BSR"]


def select(state: State, selection: Selection) -> frozenset[int]:
    """Head, then blocks by their mean movement, the last one in part if the budget cuts it."""
    if not primed(state, selection):
        return priming(state, selection)
    parts = find_blocks([layer.name for layer in selection.layers])

    def movement(block: tuple[int, ...]) -> float:
        return sum(state["moved"][layer] / max(state["visits"][layer], 1) for layer in block) / len(block)

    blocks = sorted(parts.blocks, key=movement, reverse=True)
    free = set(selection.candidates)
    ranking = [*parts.after, *(layer for block in blocks for layer in block), *parts.before]
    return selection.budget.fill([layer for layer in ranking if layer in free], selection.always)


BSR = Policy(init, select, observe)
