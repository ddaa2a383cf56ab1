"""The model that a run starts from: known by the contents of its safetensors files, wherever it lies."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slimfit_ds.files import write_atomically
from slimfit_ds.trainable.split import SplitModule
from slimfit_ds.trainable.units import COLUMNS, is_part, named_tensors

__all__ = [
    "Base",
    "BaseTensors",
    "DeltaError",
    "base_of",
    "base_problems",
    "find_base",
    "other_tensors",
    "version_of",
    "whole_name",
]

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


class DeltaError(RuntimeError):
    """A delta, or its base, is not what it must be."""


@dataclass(frozen=True)
class Base:
    """The identity of a base."""

    name: str
    """Hub id, or the path that it had."""
    revision: str | None
    """Commit on the hub, where it came from there."""
    sha256: str
    """Over names, dtypes, shapes and bytes of its tensors in the order of names; how they are cut into files is not in it."""

    def require(self, other: Base, what: str) -> None:
        """Raise unless another base has the same contents.

        Raises:
            DeltaError: names both hashes.
        """
        if self.sha256 != other.sha256:
            raise DeltaError(
                f"{what} is of base {self.name!r} with sha256 {self.sha256}, and {other.name!r} has sha256 {other.sha256}; "
                f"take the base that it was made from{f', revision {self.revision}' if self.revision else ''}"
            )


def find_base(name: str | os.PathLike, revision: str | None = None) -> tuple[Path, Base]:
    """Find a base and hash it; a hash is remembered for as long as path, time and size of each file stay.

    Args:
        name: a folder with safetensors files as transformers writes them, or a hub id.
        revision: on the hub.

    Returns:
        Its folder and its identity.

    Raises:
        DeltaError: there is none, or it has no readable safetensors.
    """
    folder = Path(name).expanduser()
    known_as = str(folder.absolute())
    if not folder.is_dir():
        folder, known_as = _from_hub(os.fspath(name), revision), os.fspath(name)
    files, key = _weight_files(folder), version_of(folder)
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "slimfit_ds", "bases", key)
    known = cached.read_text() if cached.is_file() else ""
    if len(known) != 64:
        known = _hash(files)
        with suppress(OSError):  # It is computed again next time.
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cached, known)
    return folder, Base(known_as, revision, known)


def version_of(folder: Path) -> str:
    """A hash over path, time and size of the files of a base: another one, and the base may be another one.

    Raises:
        DeltaError: they are not there.
    """
    files = _weight_files(folder)
    stats = [(str(file.resolve()), (stat := file.stat()).st_mtime_ns, stat.st_size) for file in files]
    return hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def base_of(model: nn.Module) -> tuple[Path, Base]:
    """Find the base of a model, which transformers has noted in its config.

    Raises:
        DeltaError: the model was not loaded from a folder or the hub, or not from safetensors; or it has adapters.
    """
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise DeltaError(
            "the model has adapters of PEFT, which train beside the base: PEFT saves them alone, by save_pretrained and in a "
            "Trainer's checkpoints; leave slimfit.checkpoints at whole"
        )
    config: Any = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    if not name:
        raise DeltaError(
            "the model has no base: it was not loaded by from_pretrained, so what trained cannot be kept apart; save the whole "
            "model (slimfit.checkpoints: whole), or save_pretrained it once and load it from there"
        )
    return find_base(name, getattr(config, "_commit_hash", None))


def base_problems(model: nn.Module, output: str | os.PathLike | None = None) -> list[str]:
    """What keeps a model from being saved as a delta; a line, or nothing.

    Args:
        output: the folder that a Trainer writes to.
    """
    try:
        folder = base_of(model)[0].resolve()
    except DeltaError as error:
        return [f"slimfit.checkpoints is delta, but {error}"]
    if output is not None:
        target = Path(output).resolve()
        if folder == target or (folder.parent == target and folder.name.startswith("checkpoint-")):
            return [
                f"slimfit.checkpoints is delta, and output_dir {os.fspath(output)!r} has the base {os.fspath(folder)!r} in it, "
                "which the run might replace or remove, and without which a delta is worth nothing: choose another output_dir"
            ]
    return []


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, malformed names: the hub's errors are many
        reason = " ".join(str(error).split())[:200]
        raise DeltaError(f"base {name!r} is no folder, and the hub does not give it ({reason})") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    names = {_WEIGHTS}
    if not (folder / _WEIGHTS).is_file() and index.is_file():
        try:
            names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
        except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise DeltaError(f"{index} cannot be read: {type(error).__name__}: {error}") from None
    files = [folder / name for name in sorted(names)]
    missing = [file for file in files if file.parent != folder or not file.is_file()]
    if missing:
        raise DeltaError(
            f"the base {str(folder)!r} has no {missing[0].name}; a base is a folder with safetensors: load the model and "
            "save_pretrained it once"
        )
    return files


def _hash(files: Collection[Path]) -> str:
    digest = hashlib.sha256()
    with ExitStack() as stack:
        places: dict[str, tuple[dict[str, Any], memoryview]] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt"):
                    pass  # Checks the header against the size of the file.
            except (SafetensorError, OSError) as error:
                raise DeltaError(f"{file} of the base cannot be read: {error}") from None
            handle = stack.enter_context(file.open("rb"))
            memory = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
            stack.callback(memory.release)
            start = 8 + int.from_bytes(memory[:8], "little")
            header = json.loads(bytes(memory[8:start]))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                first, last = entry["data_offsets"]
                piece = stack.enter_context(memory[start + first : start + last])
                places[name] = (entry, piece)
        for name, (entry, piece) in sorted(places.items()):
            digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            digest.update(piece)
    return digest.hexdigest()


class BaseTensors:
    """The tensors of a base, by the names that a model has for them; a context.

    Args:
        model: may be split; the names of its columns give those of the base.
        folder: of the base.
    """

    def __init__(self, model: nn.Module, folder: Path):
        self._files = _weight_files(folder)
        self._stack = ExitStack()
        self._index: dict[str, Any] = {}
        self._prefix = getattr(model, "base_model_prefix", "")
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self._aliases = {name: each for each in names.values() for name in each}
        self.layers: dict[str, SplitModule] = {
            f"{name}.weight" if name else "weight": module
            for name, module in model.named_modules()
            if isinstance(module, SplitModule)
        }

    def __enter__(self) -> BaseTensors:
        for path in self._files:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            self._index |= dict.fromkeys(file.keys(), file)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, name: str) -> Tensor | None:
        """Read a tensor; None: the base has none by this name, nor without or with the prefix that transformers gives the
        backbone of a model with a head.
        """
        owner = whole_name(name)
        for alias in self._aliases.get(owner, [owner]):
            for spelling in _spellings(alias, self._prefix):
                if spelling in self._index:
                    tensor = self._index[spelling].get_tensor(spelling)
                    return tensor if owner == name else self.layers[owner].split.of_weight(tensor)
        return None


def whole_name(name: str) -> str:
    """The name of the weight that a parameter is, or is the trained columns of."""
    return f"{name.removesuffix(COLUMNS)}weight" if is_part(name) else name


def other_tensors(
    model: nn.Module,
    trained: Collection[str],
    folder: Path,
    whole: Callable[[Tensor], AbstractContextManager[Any]] = lambda tensor: nullcontext(),
) -> list[str]:
    """Names of tensors that have not trained, and still are not the base's, bit for bit: heads that were made anew, weights
    that somebody has changed, or that transformers has converted while it loaded them.

    Args:
        model: may be split.
        trained: names of parameters that are not looked at; of a split layer its columns have a name of their own.
        folder: of the base.
        whole: a context in which a tensor that ZeRO 3 has cut is whole.
    """
    found = []
    with BaseTensors(model, folder) as tensors:
        for name, tensor in named_tensors(model):
            if name in trained:
                continue
            expected = tensors.get(name)
            layer = tensors.layers.get(name)
            with whole(tensor), nullcontext() if layer is None else whole(layer.weight_columns):
                if expected is not None:
                    expected = expected.to(tensor.dtype)
                if layer is not None and expected is not None and expected.shape == tensor.shape:
                    # Of the trained columns this is not the place to judge.
                    layer.split.fill(tensor, layer.weight_columns)
                    layer.split.fill(expected, layer.weight_columns)
                if expected is None or not _same(tensor, expected):
                    found.append(name)
    return found


def _spellings(name: str, prefix: str) -> Iterator[str]:
    yield name
    if prefix:
        yield name.removeprefix(f"{prefix}.")
        yield f"{prefix}.{name}"


def _same(tensor: Tensor, expected: Tensor) -> bool:
    if tensor.shape != expected.shape:
        return False
    expected, mine = expected.contiguous(), tensor.detach().to(expected.device).contiguous()
    return torch.equal(mine.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
