"""`slimfit-ds export`: the most exact weights of a checkpoint as one safetensors file, without a model or an engine."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimfit_ds.deltas.base import DeltaError
from slimfit_ds.deltas.delta import DELTA, read_delta
from slimfit_ds.deltas.load import load_merged
from slimfit_ds.engine.checkpoint_files import MODEL, CheckpointError, ShardReader, latest_tag, read_metadata
from slimfit_ds.files import folder_for_writing, replacing
from slimfit_ds.trainable.split import fill_columns
from slimfit_ds.trainable.units import named_tensors

__all__ = ["load_states_of", "main"]


def load_states_of(path: str | os.PathLike, base: str | os.PathLike | None = None) -> dict[str, Tensor]:
    """Return the most exact weights of a checkpoint: float32 masters where there are any, else the weights.

    The counterpart of DeepSpeed's `zero_to_fp32`.

    Args:
        base: of a checkpoint that holds a delta, where its base lies; None: where it lay.

    Returns:
        Name -> tensor in the shape of the weight; float32 for floating-point tensors.
    """
    folder = Path(path)
    if (tag := latest_tag(folder)) is not None:
        folder = folder / tag
    metadata = read_metadata(folder)
    delta = read_delta(folder) if (folder / DELTA).is_file() else None
    if delta is None and base is not None:
        raise CheckpointError(f"{folder} holds whole weights, which need no base: leave base out")
    saved = load_file(folder / MODEL) if delta is None else delta.tensors
    result: dict[str, Tensor] = {}
    with ShardReader(sorted(folder.glob("optimizer-*.safetensors"))) as reader:
        for name, weight in saved.items():
            exact = weight.to(torch.float32) if weight.is_floating_point() else weight
            reader.read_into(exact.view(-1), name, "master", 0)
            result[name] = exact
    if delta is not None:
        exact_delta = dataclasses.replace(delta, tensors=result)
        # In the dtype of the run, whose frozen weights these are.
        where = (delta.base.name, delta.base.revision) if base is None else (os.fspath(base), None)
        try:
            model = load_merged(where[0], exact_delta, where[1]).float()
        except DeltaError as error:
            remedy = "; if it has moved, say where it is by --base" if base is None else ""
            raise DeltaError(f"{error}{remedy}") from None
        return {name: tensor.detach() for name, tensor in named_tensors(model)}
    return fill_columns(result, metadata.get("columns", {}))


def main(argv: Sequence[str] | None = None) -> int:
    """Write float32 weights (masters where there are any) of a checkpoint; like DeepSpeed's `zero_to_fp32`.

    Returns:
        0; 2 if there is no such checkpoint, or the target exists or cannot be written.
    """
    parser = argparse.ArgumentParser(prog="slimfit-ds export", description=main.__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint folder, or the folder that holds `latest`"
    )
    parser.add_argument(
        "output",
        type=Path,
        help="the .safetensors file to write, or a folder for it; the file must not exist",
    )
    parser.add_argument(
        "--base", help="folder or hub id of the base of a delta checkpoint (default: where it lay)"
    )
    arguments = parser.parse_args(argv)
    output = arguments.output if arguments.output.suffix == ".safetensors" else arguments.output / MODEL
    if output.exists():
        print(f"slimfit-ds export: {output} exists; choose another name", file=sys.stderr)
        return 2
    try:
        with folder_for_writing(output.parent), replacing(output) as part:
            weights = load_states_of(arguments.checkpoint, arguments.base)
            save_file(weights, part, metadata={"format": "pt"})
    except (CheckpointError, DeltaError, SafetensorError, OSError) as error:
        print(f"slimfit-ds export: {error}", file=sys.stderr)
        return 2
    print(f"{len(weights)} tensors, {output.stat().st_size:,} bytes: {output}")
    return 0
