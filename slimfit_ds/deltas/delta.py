"""A delta: what trained, as values, and the base that all the rest is of; one safetensors file that runs no code.

A tensor has the name of its parameter in the model. `X.weight_columns` are the trained columns of `X.weight`, and the
metadata say where they stand; everything else is whole: norms, biases, heads, layers of which all trained, buffers.
Values, not differences: a base with a delta in it is the trained model to the bit.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slimfit_ds.deltas.base import (
    Base,
    BaseTensors,
    DeltaError,
    base_of,
    other_tensors,
    version_of,
    whole_name,
)
from slimfit_ds.files import folder_for_writing, latest_tag, replacing
from slimfit_ds.trainable.split import Split, column_places
from slimfit_ds.trainable.units import COLUMNS, full_shape, is_part, named_tensors

__all__ = [
    "DELTA",
    "Delta",
    "Source",
    "check_fit",
    "describe",
    "filled",
    "from_state",
    "read_delta",
    "whole_state",
    "write_delta",
    "write_into",
]

DELTA = "delta.safetensors"
"""Name of a delta's file."""
_WEIGHTS = "model.safetensors"
"""Name of a delta's file in a Trainer's checkpoint, and of a base's."""
_FORMAT = 1
_KEY = "slimfit_delta"


@dataclass(frozen=True)
class Delta:
    """What trained of a model."""

    base: Base
    tensors: Mapping[str, Tensor]
    """Parameter's name -> values."""
    places: Mapping[str, Split]
    """Name of a weight -> where its columns stand."""
    architecture: str | None = None
    """Class of transformers."""
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Plain values of the model's config."""
    dtype: str = "float32"
    """Of the model that trained."""


class Source:
    """A model and its base: what a delta of it must hold. What is frozen is compared with the base once.

    Args:
        model: loaded by transformers from safetensors; may be split.
        whole: a context in which a tensor that ZeRO 3 has cut is whole.
    """

    def __init__(
        self,
        model: nn.Module,
        whole: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext,
    ):
        self._model, self._whole = model, whole
        self._found: tuple[Path, Base] | None = None
        self._version = ""
        self._others: list[str] | None = None

    @property
    def base(self) -> Base:
        """The base; hashed at first use, and again once its files have changed.

        Raises:
            DeltaError: the model has none.
        """
        return self._locate()[1]

    @property
    def folder(self) -> Path:
        """Where the base lies."""
        return self._locate()[0]

    def _locate(self) -> tuple[Path, Base]:
        if self._found is None or version_of(self._found[0]) != self._version:
            self._found, self._others = base_of(self._model), None
            self._version = version_of(self._found[0])
        return self._found

    def names(self, trained: Iterable[str]) -> set[str]:
        """Names of the tensors that the base lacks: what trained, buffers, and what is not the base's bit for bit.

        Args:
            trained: names of parameters that have trained.
        """
        folder = self.folder  # Forgets what was compared if the base has changed since.
        present = dict(named_tensors(self._model))
        kept = {name for name in trained if name in present}
        kept |= {name for name, tensor in present.items() if not isinstance(tensor, nn.Parameter)}
        # The base is loaded in one dtype; what has another stands in the delta.
        dtype = _dtype_of(self._model)
        kept |= {
            name for name, tensor in present.items() if tensor.is_floating_point() and tensor.dtype != dtype
        }
        if self._others is None:
            self._others = other_tensors(self._model, kept, folder, self._whole)
        return kept | {*self._others}

    def forget(self) -> None:
        """Compare again: somebody has loaded other weights."""
        self._others = None

    def target_problem(self, path: str | os.PathLike) -> str | None:
        """Why a delta of the model must not be written to a path: it would replace something else; None: it may.

        Raises:
            DeltaError: the model has no base.
        """
        path = Path(path)
        if path.parent.resolve() == self.folder.resolve() and path.name == _WEIGHTS:
            return f"{path} is where the weights of the base {self.base.name!r} stand; choose another name"
        if path.is_dir():
            return f"{path} is a folder; name a file in it, such as {path / DELTA}"
        if path.exists():
            try:
                read_delta(path, names=())
            except DeltaError:
                return f"{path} exists and is no delta, so it is not replaced; choose another name"
        return None

    def capture(self, trained: Iterable[str]) -> Delta:
        """Take what trained out of a model that this process holds whole."""
        kept = self.names(trained)
        tensors = {n: _on_host(t) for n, t in named_tensors(self._model) if n in kept}
        return describe(self._model, self.base, tensors)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def describe(model: nn.Module, base: Base, tensors: Mapping[str, Tensor]) -> Delta:
    """Make a delta of tensors, and of what the model says of itself."""
    parts = {whole_name(name) for name in tensors if is_part(name)}
    places = {name: Split(*place) for name, place in column_places(model).items() if name in parts}
    config: Any = getattr(model, "config", None)
    known = type(model).__module__.startswith("transformers.")
    return Delta(
        base,
        tensors,
        places,
        type(model).__name__ if known else None,
        plain_values(config.to_dict()) if hasattr(config, "to_dict") else {},
        str(_dtype_of(model)).removeprefix("torch."),
    )


_NOT_TAKEN = (
    "auto_map",
    "quantization_config",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "architectures",
)
_LABELS = ("id2label", "label2id")
"""The texts of labels may have any character."""


def plain_values(values: Any) -> Any:
    """Of a config what only describes a model: nothing that names code, files or kernels."""
    if isinstance(values, Mapping):
        return {
            str(key): dict(value) if key in _LABELS and isinstance(value, Mapping) else plain_values(value)
            for key, value in values.items()
            if not str(key).startswith("_")
            and "implementation" not in str(key)
            and key not in _NOT_TAKEN
            and _is_plain(value)
        }
    return [plain_values(value) for value in values] if isinstance(values, list | tuple) else values


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return not set(value) & set("/\\:")
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | Mapping)


def write_delta(delta: Delta, path: str | os.PathLike) -> None:
    """Write a delta; the file is there whole or not at all.

    Raises:
        DeltaError: it cannot be written.
    """
    path = Path(path)
    try:
        with folder_for_writing(path.parent), replacing(path) as part:
            write_into(delta, part)
    except (SafetensorError, OSError) as error:
        raise DeltaError(f"the delta {path} is not written: {error}") from None


def write_into(delta: Delta, path: Path, as_state: bool = False) -> None:
    """Write a delta to a path of the caller's, who sees to it that it is whole.

    Args:
        as_state: the metadata are in the file once more as a tensor, for readers that see tensors only; see `from_state`.
    """
    text = _about(delta)
    tensors = dict(delta.tensors)
    if as_state:
        tensors[_KEY] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt", _KEY: text})


def from_state(state: Mapping[str, Tensor]) -> Delta | None:
    """Return the delta that a dict of tensors is; None: it is none.

    Raises:
        DeltaError: it does not hold together.
    """
    if _KEY not in state:
        return None
    tensors = {name: tensor for name, tensor in state.items() if name != _KEY}
    text = bytes(state[_KEY].tolist()).decode()
    delta = _parse(text, {name: list(tensor.shape) for name, tensor in tensors.items()}, "the checkpoint")
    return dataclasses.replace(delta, tensors=tensors)


def whole_state(model: nn.Module, source: Source, delta: Delta) -> dict[str, Tensor]:
    """A dict of whole tensors by name: a base with a delta in it.

    Args:
        model: split or not, for the names.
        source: of the model.
        delta: of this base.

    Raises:
        DeltaError: another base, or neither it nor the delta has a tensor of the model.
    """
    delta.base.require(source.base, "the delta")
    check_fit(model, delta)
    state = {}
    with BaseTensors(model, source.folder) as tensors:
        for name, tensor in named_tensors(model):
            if is_part(name):
                continue
            value = delta.tensors.get(name)
            if value is None:
                value = tensors.get(name)
            if value is None:
                raise DeltaError(f"neither the delta nor its base {source.base.name!r} has {name!r}")
            part = f"{name.removesuffix('weight')}{COLUMNS}"
            if part in delta.tensors and name in delta.places:
                value = value.to(tensor.dtype, copy=True)
                delta.places[name].fill(value, delta.tensors[part])
            state[name] = value
    return state


def filled(delta: Delta) -> dict[str, Tensor]:
    """The tensors of a delta, each weight once: one that is there whole, as it was not the base's before it trained, has its
    trained columns in it, in their dtype.
    """
    tensors = dict(delta.tensors)
    for name in filter(is_part, delta.tensors):
        whole = whole_name(name)
        if whole in tensors:
            columns = tensors.pop(name)
            tensors[whole] = tensors[whole].to(columns.dtype, copy=True)
            delta.places[whole].of_weight(tensors[whole]).copy_(columns)
    return tensors


def _about(delta: Delta) -> str:
    about = {
        "format": _FORMAT,
        "base": dataclasses.asdict(delta.base),
        "places": {name: dataclasses.astuple(split) for name, split in delta.places.items()},
        "architecture": delta.architecture,
        "config": delta.config,
        "dtype": delta.dtype,
    }
    return json.dumps(about)


def read_delta(path: str | os.PathLike, names: Collection[str] | None = None) -> Delta:
    """Read a delta; nothing in it is run.

    Args:
        path: of the file, or of a folder that holds one: by the name `delta.safetensors`, as a checkpoint of a Trainer, or as
            one of the engine, which `latest` names.
        names: of the tensors to read; None: all.

    Raises:
        DeltaError: not a whole delta of this format.
    """
    path = _file_of(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise DeltaError(f"{path} is no delta: it has no metadata {_KEY!r}")
            present = [name for name in file.keys() if name != _KEY]  # noqa: SIM118 - no mapping
            shapes = {name: file.get_slice(name).get_shape() for name in present}
            delta = _parse(text, shapes, str(path))
            tensors = {name: file.get_tensor(name) for name in shapes if names is None or name in names}
    except FileNotFoundError:
        raise DeltaError(f"there is no delta {path}") from None
    except (SafetensorError, OSError) as error:
        raise DeltaError(f"{path} is no whole delta: {error}") from None
    return dataclasses.replace(delta, tensors=tensors)


def _file_of(path: Path) -> Path:
    if not path.is_dir() or (path / DELTA).is_file():
        return path / DELTA if path.is_dir() else path
    if (tag := latest_tag(path)) is not None:
        return path / tag / DELTA
    return path / (_WEIGHTS if (path / _WEIGHTS).is_file() else DELTA)


def _parse(text: str, shapes: Mapping[str, list[int]], path: str) -> Delta:
    try:
        about = json.loads(text)
        if (found := about["format"]) != _FORMAT:
            raise DeltaError(f"{path} has delta format {found!r}; this version reads {_FORMAT}")
        base = Base(*(about["base"][key] for key in ("name", "revision", "sha256")))
        places = {name: Split(*place) for name, place in about["places"].items()}
        delta = Delta(base, {}, places, about["architecture"], plain_values(about["config"]), about["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DeltaError(f"the metadata of {path} are no delta's: {type(error).__name__}: {error}") from None
    if not isinstance(delta.config, dict) or not all(isinstance(v, str) for v in (base.name, base.sha256)):
        raise DeltaError(f"the metadata of {path} are no delta's")
    if not isinstance(getattr(torch, str(delta.dtype), None), torch.dtype):
        raise DeltaError(f"{path}: no dtype {delta.dtype!r}")
    parts = {whole_name(name): shape for name, shape in shapes.items() if is_part(name)}
    if parts.keys() != places.keys():
        raise DeltaError(
            f"{path}: {sorted(parts.keys() ^ places.keys())[0]!r} has columns or a place, not both"
        )
    for name, split in places.items():
        numbers = (split.start, split.stride, split.count, 0 if split.rows is None else split.rows)
        sound = all(type(n) is int and 0 <= n < 2**40 for n in numbers) and split.stride and split.count
        shape = parts[name]
        if not sound or len(shape) != 2 or shape[0 if split.transposed is True else 1] != split.count:
            raise DeltaError(f"{path}: columns {split} of {name!r} do not fit values of shape {shape}")
    return delta


def check_fit(model: nn.Module, delta: Delta) -> None:
    """Raise unless every tensor of a delta has its place in a whole model.

    Raises:
        DeltaError: names the first that has none.
    """
    present = dict(named_tensors(model))
    for name, values in delta.tensors.items():
        whole = whole_name(name)
        if whole not in present:
            raise DeltaError(f"the delta has {name!r}, which {type(model).__name__} has not")
        shape = full_shape(present[whole])
        if is_part(name):
            split = delta.places[whole]
            width = shape[0 if split.transposed else 1] if len(shape) == 2 else 0
            last = split.start + (split.count - 1) * split.stride
            rows = shape[1] if split.transposed else shape[0] if split.rows is None else split.rows
            fits = last < width and rows <= max(shape) and values.shape[1 if split.transposed else 0] == rows
        else:
            fits = values.shape == shape
        if not fits:
            raise DeltaError(
                f"{name!r} of the delta has shape {list(values.shape)}, and does not fit {list(shape)}"
            )
