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
from slimfit_ds.optim.low_bit import dequantize_cut, is_signed

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

FORMAT = 2
"""2: moments that are kept in 8 bits are saved so."""
_READ = (1, 2)
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
    if not isinstance(metadata, dict) or metadata.get("format") not in _READ:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise CheckpointError(
            f"{path} has checkpoint format {found!r}; this version reads {_READ[0]} and {_READ[1]}"
        )
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
    """State name -> flat float32 values of the stretch; of 8-bit moments `<name>.codes` and `<name>.scale`."""
    offset: int = 0
    """Where in its block of 8-bit moments the stretch begins."""


def write_shards(shards: Iterable[Shard], path: Path) -> None:
    """Write a rank's shards: tensors as `<parameter>::<state>`, positions in the file's metadata."""
    tensors: dict[str, Tensor] = {}
    starts: dict[str, int] = {}
    offsets: dict[str, int] = {}
    for shard in shards:
        starts[shard.name], offsets[shard.name] = shard.start, shard.offset
        for state, values in shard.tensors.items():
            # A view into a larger storage would be refused, and the host copy is needed anyway.
            tensors[f"{shard.name}::{state}"] = values.detach().cpu().clone()
    save_file(tensors, path, metadata={"starts": json.dumps(starts), "offsets": json.dumps(offsets)})


@dataclass(frozen=True)
class _Saved:
    """A stretch of one state in a file; `offset` is None where it is in float32."""

    file: Any
    key: str
    start: int
    offset: int | None

    @property
    def length(self) -> int:
        return self.file.get_slice(self.key).get_shape()[0]

    def values(self, low: int, high: int, signed: bool) -> Tensor:
        if self.offset is None:
            return self.file.get_slice(self.key)[low:high]
        return dequantize_cut(*self.blocks(), self.offset, signed)[low:high]

    def blocks(self) -> tuple[Tensor, Tensor]:
        scale = f"{self.key.removesuffix('.codes')}.scale"
        return self.file.get_tensor(self.key), self.file.get_tensor(scale)


class ShardReader:
    """Reads any stretch of any state from the files of all ranks of the run that wrote them.

    Args:
        paths: the files of one checkpoint.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths
        self._stack = ExitStack()
        self._index: dict[tuple[str, str], list[_Saved]] = {}

    def __enter__(self) -> ShardReader:
        for path in self._paths:
            file = self._stack.enter_context(safe_open(path, framework="pt"))
            starts = json.loads(file.metadata()["starts"])
            offsets = json.loads(file.metadata().get("offsets", "{}"))
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                name, _, state = key.rpartition("::")
                state, _, kind = state.partition(".")
                if kind != "scale":
                    offset = offsets.get(name, 0) if kind else None
                    self._index.setdefault((name, state), []).append(_Saved(file, key, starts[name], offset))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def has(self, name: str, state: str) -> bool:
        return (name, state) in self._index

    def read_into(self, target: Tensor, name: str, state: str, start: int) -> None:
        """Fill a flat tensor with positions `start ...` of a state; what was not saved stays as it is."""
        stop = start + target.numel()
        for saved in self._index.get((name, state), []):
            low, high = max(start, saved.start), min(stop, saved.start + saved.length)
            if low < high:
                values = saved.values(low - saved.start, high - saved.start, is_signed(state))
                target[low - start : high - start] = values.to(target.device)

    def blocks(
        self, name: str, state: str, start: int, length: int, offset: int
    ) -> tuple[Tensor, Tensor] | None:
        """Codes and scales of a stretch of 8-bit moments, if one was saved that is just this and stood so in its blocks."""
        for saved in self._index.get((name, state), []):
            if (saved.start, saved.length, saved.offset) == (start, length, offset):
                return saved.blocks()
        return None


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
