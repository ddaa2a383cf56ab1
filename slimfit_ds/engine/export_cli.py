"""`slimfit-ds export`: the most exact weights of a checkpoint as one safetensors file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write float32 weights (masters where there are any) of a checkpoint; like DeepSpeed's `zero_to_fp32`.

    Returns:
        0; 2 if there is no such checkpoint or the target exists.
    """
    from slimfit_ds.engine.checkpoint import CheckpointError, load_states_of

    parser = argparse.ArgumentParser(prog="slimfit-ds export", description=main.__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a checkpoint folder, or the folder that holds `latest`"
    )
    parser.add_argument("output", type=Path, help="the .safetensors file to write; must not exist")
    arguments = parser.parse_args(argv)
    if arguments.output.exists():
        print(f"slimfit-ds export: {arguments.output} exists; choose another name", file=sys.stderr)
        return 2
    try:
        weights = load_states_of(arguments.checkpoint)
    except (CheckpointError, SafetensorError) as error:
        print(f"slimfit-ds export: {error}", file=sys.stderr)
        return 2
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, arguments.output, metadata={"format": "pt"})
    print(f"{len(weights)} tensors, {arguments.output.stat().st_size:,} bytes: {arguments.output}")
    return 0
