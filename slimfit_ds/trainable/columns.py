"""Training some columns of every linear layer and of the word embedding: the rest of each weight is frozen for the whole run.

The weight gradient of a linear layer is `dy^T x`; its columns `c` are `dy^T x[:, c]`. So a layer of which one input column
in ten trains keeps a tenth of its input, makes a tenth of its gradient and has a tenth of the optimizer states, as if one
layer in ten trained; but every layer learns at every step. Layers that read the same tensor (queries, keys and values)
train the same columns of it and share one copy. Of the vectors of the word embedding some places train, which keeps no input.

The trained columns are a parameter of their own, `weight_columns`, beside the layer's frozen `weight`. In `state_dict()`
there is only `weight`, up to date, and `load_state_dict()` fills both.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.trainable.column_plan import plan_columns
from slimfit_ds.trainable.layers import COLUMNS, discover
from slimfit_ds.trainable.split_modules import Split, SplitEmbedding, SplitLinear, SplitModule

__all__ = [
    "adopt_columns",
    "column_places",
    "fill_columns",
    "split_columns",
    "unsplit_columns",
]


def _merge_into_state(module: SplitModule, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """A state dict has whole weights only."""
    columns = state.pop(f"{prefix}{COLUMNS}", None)
    weight = state.get(f"{prefix}weight")
    # Under ZeRO 3 there is nothing here of a weight that is not gathered.
    if columns is not None and weight is not None and weight.numel() and columns.numel():
        module.split.fill(weight, columns)


def _take_from_state(module: SplitModule, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The columns of a state dict of whole weights."""
    weight = state.get(f"{prefix}weight")
    if weight is not None and f"{prefix}{COLUMNS}" not in state:
        state[f"{prefix}{COLUMNS}"] = module.split.of_weight(weight).clone()


def split_columns(
    model: nn.Module,
    config: FreezeConfig,
    whole: Callable[[Tensor], AbstractContextManager[Any]] = lambda weight: nullcontext(),
) -> tuple[str, ...]:
    """Make some columns of every linear layer and of the word embedding trainable, and the rest of them frozen.

    Of each tensor that linear layers read the same number of columns trains, a share `1 - rate` on the whole, and of the
    word embedding, if no output layer shares its weight, as many, for as many words from the front of the vocabulary as the
    weights that this leaves are enough for. Norms, biases,
    parameters that are merely added, the linear layers behind the blocks (pooler and head of a task, no output embedding)
    and `always_active` layers train whole; other embeddings, convolutions and `never_active` layers do not train. The columns
    of a layer are evenly spaced, from a start that is drawn by `seed`. All that trains, biases aside, takes at most `1 - rate`
    of the weights and of the inputs. A model that is split already stays as it is.

    Args:
        model: is changed in place.
        config: `rate`, `seed`, `always_active` and `never_active` of it.
        whole: a context in which a weight that ZeRO 3 has cut is whole.

    Returns:
        Names of the weights that it has frozen, in part or whole.

    Raises:
        ConfigError: what `plan_columns` finds.
    """
    if any(isinstance(module, SplitModule) for module in model.modules()):
        return ()
    plan = plan_columns(model, config)
    split = {each.layer.name: each for each in plan.split}
    frozen = []
    for layer in discover(model).layers:
        if layer.name in plan.whole:
            continue
        frozen.append(layer.name)
        if layer.name in split:
            owner: Any = model.get_submodule(layer.name.rpartition(".")[0])
            with whole(owner.weight):
                each = split[layer.name]
                _split(owner, each.count, each.rows, random.Random(f"{config.seed}:{each.source}"))
        else:
            model.get_parameter(layer.name).requires_grad_(False)
    return tuple(frozen)


def _split(module: Any, count: int, rows: int | None, chance: random.Random) -> None:
    base = type(module)
    transposed = base.__name__ == "Conv1D"
    width = module.weight.shape[0 if transposed else 1]
    stride = width // count
    split = Split(chance.randrange(width - (count - 1) * stride), stride, count, transposed, rows)
    trained = split.of_weight(module.weight.detach()).clone(memory_format=torch.contiguous_format)
    module.weight.requires_grad_(False)
    module.register_parameter(COLUMNS, nn.Parameter(trained))
    kind = SplitEmbedding if isinstance(module, nn.Embedding) else SplitLinear
    # The same name: what is told by the name of a class stays true.
    module.__class__ = type(base.__name__, (kind, base), {"split": split, "whole_class": base})
    module.split_hooks = (
        module._register_state_dict_hook(_merge_into_state),
        module.register_load_state_dict_pre_hook(_take_from_state),
    )


def adopt_columns(model: nn.Module, groups: Iterable[dict[str, Any]], states: Any = None) -> None:
    """Let an optimizer's parameter groups that were made before the split hold the columns instead of the weights.

    Args:
        model: the split model; one that is not split changes nothing.
        groups: as torch's optimizers have them; changed in place.
        states: of the optimizer, by parameter: what it loaded for columns under the name of their weight is theirs.
    """
    instead = {m.weight: m.weight_columns for m in model.modules() if isinstance(m, SplitModule)}
    if not instead:
        return
    groups = list(groups)
    held = {id(p) for group in groups for p in group["params"]}
    for group in groups:
        group["params"] = [
            instead[p] if p in instead and id(instead[p]) not in held else p for p in group["params"]
        ]
    for weight, columns in instead.items():
        if states and weight in states:
            state = states.pop(weight)
            # Moments of a whole weight that has trained before are of no use to its columns.
            if all(t.dim() == 0 or t.shape == columns.shape for t in state.values() if isinstance(t, Tensor)):
                states[columns] = state


def column_places(model: nn.Module) -> dict[str, tuple[int, int, int, bool, int | None]]:
    """Where the columns of each split weight stand in it, by the weight's name: what `fill_columns` needs."""
    return {
        f"{name}.weight" if name else "weight": dataclasses.astuple(module.split)
        for name, module in model.named_modules()
        if isinstance(module, SplitModule)
    }


def fill_columns(state: Mapping[str, Tensor], places: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
    """A dict of all parameters by name, as a model that was never split has them.

    Args:
        state: whole tensors by name, columns among them; is not changed.
        places: from `column_places`.
    """
    merged = dict(state)
    for name, place in places.items():
        part = f"{name.removesuffix('weight')}{COLUMNS}"
        # Without its weight a part is left as it is: somebody wants what trained alone.
        if part in merged and name in merged:
            merged[name] = merged[name].clone()
            Split(*place).fill(merged[name], merged.pop(part))
    return merged


def unsplit_columns(model: nn.Module, frozen: Iterable[str]) -> None:
    """Undo `split_columns`: whole weights with what was learned, and what it froze trains again.

    Args:
        model: the split model.
        frozen: what `split_columns` returned.
    """
    for module in list(model.modules()):
        if isinstance(module, SplitModule):
            module.split.fill(module.weight, module.weight_columns)
            for hook in module.split_hooks:
                hook.remove()
            del module.weight_columns, module.split_hooks
            module.__class__ = module.whole_class  # type: ignore[assignment]
    for name in frozen:
        model.get_parameter(name).requires_grad_(True)
