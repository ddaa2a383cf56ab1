"""Values that take turns with those in a model, in place: a base under a model that trains, or one delta after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.deltas.base import DeltaError, other_tensors, whole_name
from slimfit_ds.deltas.delta import Delta, Source, check_fit, filled
from slimfit_ds.trainable.split import Split, SplitModule
from slimfit_ds.trainable.units import COLUMNS, is_part, named_tensors

__all__ = ["DeltaSwitch", "Overlay"]


@dataclass
class _Entry:
    module: nn.Module
    local: str
    """Name of the tensor in the module; of columns `weight_columns`, whether the module is split now or not."""
    split: Split | None
    values: Tensor


class Overlay:
    """Other values for some tensors of a model.

    Layers may be split, or become whole again, in between.

    Args:
        model: has the tensors.
        values: parameter's name -> what takes turns with it; `X.weight_columns` are columns of `X.weight`.
        places: name of a weight -> where its columns stand.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor], places: Mapping[str, Split]):
        self._entries = []
        for name, value in values.items():
            owner, _, local = name.rpartition(".")
            module = model.get_submodule(owner)
            split = places[f"{name.removesuffix(COLUMNS)}weight"] if is_part(name) else None
            like: Any = getattr(module, local, None) if split is None else module.weight
            value = value.detach().to(like.device, like.dtype, copy=True)
            self._entries.append(_Entry(module, local, split, value))

    @property
    def nbytes(self) -> int:
        """Bytes of the values that are not in the model now."""
        return sum(entry.values.nbytes for entry in self._entries)

    @torch.no_grad()
    def exchange(self) -> None:
        """Let the values change places with those in the model."""
        for entry in self._entries:
            module, values = entry.module, entry.values
            if entry.split is not None and not isinstance(module, SplitModule):
                part = entry.split.of_weight(module.weight.data)  # type: ignore[arg-type]
                entry.values = part.clone()
                part.copy_(values)
                continue
            tensor: Any = getattr(module, entry.local)
            # No copy, and nothing that autograd would take for a change: a graph finds what it has kept when they are back.
            entry.values, tensor.data = tensor.data, values.to(tensor.device)
            if isinstance(module, SplitModule) and module.frozen_weight.device == tensor.device:
                # A graph may have kept the whole weight.
                module.split.fill(module.frozen_weight, module.weight_columns)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A context in which the model has these values."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()


class DeltaSwitch:
    """Changes deltas of one base in a running model, in place, without loading a model.

    Args:
        model: the base, as transformers loaded it, and not split.

    Raises:
        DeltaError: the model is not its base, bit for bit.

    Example:
        switch = DeltaSwitch(AutoModelForCausalLM.from_pretrained("base"))
        switch.use(read_delta("one.safetensors"))
        switch.use(read_delta("another.safetensors"))
        switch.use(None)  # the base
    """

    def __init__(self, model: nn.Module):
        self._model, self._source = model, Source(model)
        buffers = {name for name, _ in model.named_buffers()}
        if others := other_tensors(model, buffers, self._source.folder):
            raise DeltaError(f"the model is not its base {self._source.base.name!r}: {others[0]} differs")
        self._overlay: Overlay | None = None

    def use(self, delta: Delta | None) -> None:
        """Put a delta into the model, in place of the one that is in it; None: the base.

        Raises:
            DeltaError: it is of another base or does not fit; the model stays as it was.
        """
        overlay = None
        if delta is not None:
            delta.base.require(self._source.base, "the delta")
            check_fit(self._model, delta)
            self._check_dtypes(delta)
            overlay = Overlay(self._model, filled(delta), delta.places)
        if self._overlay is not None:
            self._overlay.exchange()
        if overlay is not None:
            overlay.exchange()
        self._overlay = overlay

    def _check_dtypes(self, delta: Delta) -> None:
        present = dict(named_tensors(self._model))
        for name, values in delta.tensors.items():
            own = present[whole_name(name)].dtype
            if torch.promote_types(own, values.dtype) != own:
                raise DeltaError(
                    f"{name} of the delta is {values.dtype}, the model's {own} would round it: load the base with "
                    f"dtype={values.dtype}"
                )
