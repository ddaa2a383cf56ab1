"""Whole weights of a model out of its ranks and back, under every ZeRO stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from slimfit_ds.deltas.delta import Delta, Source, describe
from slimfit_ds.errors import ConfigError
from slimfit_ds.streaming.streaming import streaming_of
from slimfit_ds.trainable.split import SplitModule, column_places, fill_columns
from slimfit_ds.trainable.units import named_tensors

__all__ = [
    "check_names",
    "gather",
    "gather_delta",
    "load_by",
    "save_pretrained",
    "scatter",
    "stored_bytes",
    "whole",
]


def whole(*tensors: Tensor, writes: bool = False):
    """A context in which parameters that ZeRO 3 has cut are whole."""
    cut = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    if not cut:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(cut, modifier_rank=0 if writes else None)


def gather(module: nn.Module, exclude: Container[str] = ()) -> dict[str, Tensor]:
    """Return every weight and buffer, whole, on the host of rank 0; an empty dict on the other ranks.

    Called by every rank.

    Args:
        exclude: names that are left out.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in named_tensors(module):
        if name in exclude:
            continue
        with whole(tensor):
            if dist.get_rank() == 0:
                result[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return result


def gather_delta(module: nn.Module, source: Source, trained: Iterable[str]) -> Delta:
    """Return what trained as a delta, its tensors on the host of rank 0; called by every rank.

    Args:
        source: of the module.
        trained: names of parameters that have trained.

    Raises:
        DeltaError: the model has no base.
    """
    kept = source.names(trained)
    others = {name for name, _ in named_tensors(module)} - kept
    return describe(module, source.base, gather(module, others))


def scatter(module: nn.Module, read: Callable[[str], Tensor], names: Container[str]) -> None:
    """Set weights and buffers, in place; called by every rank.

    Args:
        read: name -> whole tensor.
        names: those to set; what the model does not have is not read.
    """
    with torch.no_grad():
        for name, tensor in named_tensors(module):
            if name not in names:
                continue
            with whole(tensor, writes=True):
                if not hasattr(tensor, "ds_id") or dist.get_rank() == 0:
                    tensor.copy_(read(name))


def load_by(function: Callable[..., Any], module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Let a function set the weights of a module, whole, as DeepSpeed calls it; called by every rank.

    Under ZeRO 3 what the function does on rank 0 counts, and the whole model must fit.

    Args:
        function: is called with `src`, the state, and `dst`, the module.
        state: whole weights and buffers, of layers that were never split.
    """
    splits = [m for m in module.modules() if isinstance(m, SplitModule)]
    with torch.no_grad(), whole(*module.parameters(), writes=True):
        for layer in splits:
            layer.split.fill(layer.frozen_weight, layer.weight_columns)
        function(src=_with_tied_names(module, state), dst=module)
        # The function knows weights only.
        for layer in splits:
            layer.weight_columns.copy_(layer.split.of_weight(layer.frozen_weight))


def _with_tied_names(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state in which tied weights stand under each of their names."""
    complete = dict(state)
    names = {id(tensor): name for name, tensor in named_tensors(module)}
    every = (module.named_parameters, module.named_buffers)
    for name, tensor in (pair for named in every for pair in named(remove_duplicate=False)):
        if names.get(id(tensor)) in state:
            complete.setdefault(name, state[names[id(tensor)]])
    return complete


def stored_bytes(module: nn.Module) -> int:
    """Bytes of weights that this rank holds on its device: whole ones, and with ZeRO 3 its stretches."""
    streaming = streaming_of(module)
    on_host, buffers = set(), 0
    if streaming is not None:
        on_host = {tensor.untyped_storage().data_ptr() for tensor in streaming.host_tensors}
        buffers = sum(tensor.nbytes for tensor in streaming.device_tensors)
    held: dict[int, int] = {}
    for parameter in module.parameters():
        stretch = getattr(parameter, "ds_tensor", None)
        for tensor in (parameter.data, *([] if stretch is None else [stretch.data])):
            if tensor.device.type == get_accelerator().device_name():
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return sum(size for storage, size in held.items() if storage not in on_host) + buffers


def check_names(module: nn.Module, saved: set[str]) -> None:
    """Saved names must be the model's.

    Raises:
        ConfigError: names what is only in one of them.
    """
    present = {name for name, _ in named_tensors(module)}
    problems = [f"only in the checkpoint: {name}" for name in sorted(saved - present)]
    problems += [f"only in the model: {name}" for name in sorted(present - saved)]
    if problems:
        raise ConfigError([f"the checkpoint is of another model ({len(problems)} weights differ)", *problems])


def save_pretrained(module: nn.Module, state: Mapping[str, Tensor], directory: str | os.PathLike) -> None:
    """Write a model in the layout that plain transformers loads; called by rank 0.

    Args:
        state: whole weights, from `gather`.
    """
    path = Path(directory)
    state = fill_columns(state, column_places(module))
    save = getattr(module, "save_pretrained", None)
    if callable(save):
        save(path, state_dict=_with_tied_names(module, state))
        return
    path.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), path / "model.safetensors", metadata={"format": "pt"})
