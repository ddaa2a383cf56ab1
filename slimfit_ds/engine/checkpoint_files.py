"""The files of a checkpoint folder: which checkpoints are whole, shards in any cut, random states. Reading runs no code.

DIR/zero_to_fp32.py                         one file of float32 weights, by DeepSpeed's name for it
DIR/latest                                  the tag of the newest whole checkpoint
DIR/TAG/slimfit.json                        counters, schedule, scheduler, hyperparameters, client state
DIR/TAG/model.safetensors                   whole weights and buffers, by their names
DIR/TAG/optimizer-00000-of-00002.safetensors  a rank's shards of the states: `<parameter>::<state>`
DIR/TAG/random-00000-of-00002.safetensors   a rank's random states
DIR/.TAG.part, DIR/.TAG.old                 being written, being replaced
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimfit_ds.files import flush, latest_tag, write_atomically

__all__ = [
    "FORMAT",
    "METADATA",
    "MODEL",
    "CheckpointError",
    "Shard",
    "ShardReader",
    "latest_tag",
    "part_of",
    "publish",
    "random_states",
    "read_metadata",
    "recover",
    "restore_random_states",
    "write_shards",
]

FORMAT = 1
METADATA = "slimfit.json"
MODEL = "model.safetensors"

_SCRIPT = '''"""Write the float32 weights of this folder's newest checkpoint, or of the one that is named.

    python zero_to_fp32.py CHECKPOINT OUTPUT

The checkpoint is one of slimfit_ds, not of DeepSpeed's own format: this is `slimfit-ds export`.
"""

import sys

from slimfit_ds.engine.export import main

sys.exit(main())
'''


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; what was there before is untouched."""


def read_metadata(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: there is none, it cannot be read, or it is of another format.
    """
    file = path / METADATA
    if not file.is_file():
        raise CheckpointError(f"{path} is no SlimFit checkpoint: it has no {METADATA}")
    try:
        metadata = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise CheckpointError(f"{path} has checkpoint format {found!r}; this version reads {FORMAT}")
    return metadata


def part_of(directory: str | os.PathLike, tag: str) -> Path:
    """Where a checkpoint stands while it is written."""
    return Path(directory) / f".{tag}.part"


def _old_of(directory: str | os.PathLike, tag: str) -> Path:
    return Path(directory) / f".{tag}.old"


def publish(directory: str | os.PathLike, tag: str, save_latest: bool = True) -> None:
    """Give a checkpoint that is whole on disk its name, then name it in `latest`.

    Whatever happens in between, `latest` names a whole checkpoint, at most after `recover`.
    """
    final, part, old = Path(directory) / tag, part_of(directory, tag), _old_of(directory, tag)
    flush(part)
    if final.exists():
        # An older checkpoint of the same tag: out of the way first, gone after.
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    part.rename(final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    if not (script := Path(directory) / "zero_to_fp32.py").is_file():
        write_atomically(script, _SCRIPT)
    if save_latest:
        write_atomically(Path(directory) / "latest", tag)


def recover(directory: str | os.PathLike, tag: str) -> None:
    """Undo a replacement of a checkpoint that was cut off halfway."""
    final, old = Path(directory) / tag, _old_of(directory, tag)
    if old.is_dir() and not final.exists():
        old.rename(final)


@dataclass(frozen=True)
class Shard:
    """A rank's stretch of the states of one parameter."""

    name: str
    """Name of the parameter."""
    start: int
    """Position of the stretch in the flat parameter."""
    tensors: dict[str, Tensor]
    """State name -> flat float32 values of the stretch."""


def write_shards(shards: Iterable[Shard], path: Path) -> None:
    """Write a rank's shards: tensors as `<parameter>::<state>`, positions in the file's metadata."""
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    for shard in shards:
        starts[shard.name] = shard.start
        for state, values in shard.tensors.items():
            # A view into a larger storage would be refused, and the host copy is needed anyway.
            tensors[f"{shard.name}::{state}"] = values.detach().cpu().clone()
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})


class ShardReader:
    """Reads any stretch of any state from the files of all ranks of the run that wrote them.

    Args:
        paths: the files of one checkpoint.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._stack = ExitStack()
        self._index: dict[str, list[tuple[int, Any]]] = {}

    def __enter__(self) -> ShardReader:
        for path in self._paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            starts = json.loads(file.metadata()["starts"])
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                self._index.setdefault(key, []).append((starts[key.rpartition("::")[0]], file))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def has(self, name: str, state: str) -> bool:
        return f"{name}::{state}" in self._index

    def read_into(self, target: Tensor, name: str, state: str, start: int) -> None:
        """Fill a flat tensor with positions `start ...` of a state; what was not saved stays as it is."""
        key = f"{name}::{state}"
        stop = start + target.numel()
        for first, file in self._index.get(key, []):
            saved = file.get_slice(key)
            last = first + saved.get_shape()[0]
            low, high = max(start, first), min(stop, last)
            if low < high:
                target[low - start : high - start] = saved[low - first : high - first].to(target.device)


def random_states() -> dict[str, Tensor]:
    """Return the states of Python's, NumPy's and torch's generators, as tensors: reading them back runs no code."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_states(path: Path) -> None:
    """Set the generators to a captured state."""
    state = load_file(path)
    torch.set_rng_state(state["torch"])
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss = state["numpy_position"].tolist()
    keys = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, state["numpy_gauss"].item()))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
