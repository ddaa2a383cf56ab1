"""`slimfit-ds merge`: a base with a delta in it, as plain transformers loads it."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from slimfit_ds.deltas.base import DeltaError, find_base
from slimfit_ds.deltas.card import write_card
from slimfit_ds.deltas.combine import combine
from slimfit_ds.deltas.delta import read_delta
from slimfit_ds.deltas.load import load_merged
from slimfit_ds.files import new_folder

__all__ = ["main", "merge"]

_BESIDE = (".json", ".jinja", ".txt", ".model")
"""Endings of what a model's folder holds beside weights: tokenizer, chat template, generation settings."""


def merge(
    base: str | Path,
    *deltas: str | Path,
    output: str | Path,
    dtype: torch.dtype | None = None,
    weights: Sequence[float] | None = None,
) -> None:
    """Write a base with a delta in it: weights, config, a card, and what the folders hold for tokenizer and generation.

    Args:
        base: folder or hub id.
        deltas: files, or folders that hold one; a tokenizer, or generation settings, beside the first go before those of the
            base. Of several there is no card.
        output: a folder that is not there yet; it is there whole or not at all.
        dtype: of the weights; None: that of the model that trained, which is exact.
        weights: of several deltas; None: their mean.

    Raises:
        DeltaError: see `load_merged` and `combine`; or the output exists.
        OSError: the output cannot be written.
    """
    output = Path(output)
    if output.exists():
        raise DeltaError(f"{output} exists; choose another name")
    found = [read_delta(delta) for delta in deltas]
    only = len(found) == 1 and weights is None
    with new_folder(output) as part:
        model: Any = load_merged(base, found[0] if only else combine(base, found, weights))
        if dtype is not None:
            model = model.to(dtype)
            model.config.dtype = dtype
        model.save_pretrained(part)
        beside = Path(deltas[0]) if Path(deltas[0]).is_dir() else Path(deltas[0]).parent
        folder, _ = find_base(base)
        for source in (folder, beside):
            for path in sorted(source.iterdir()):
                if path.is_file() and path.suffix in _BESIDE and _belongs(path.name):
                    shutil.copyfile(path, part / path.name)
        if only:
            write_card(part, found[0], folder, beside)


def _belongs(name: str) -> bool:
    known = (
        "tokenizer",
        "vocab",
        "merges",
        "chat_template",
        "special_tokens",
        "added_tokens",
        "generation_config",
    )
    return name.startswith((*known, "preprocessor", "processor", "spiece", "sentencepiece"))


def main(argv: Sequence[str] | None = None) -> int:
    """Write a base with what trained in it, as plain transformers loads it.

    Returns:
        0; 2 if base and delta do not belong together, one cannot be read, or the output exists or cannot be written.
    """
    parser = argparse.ArgumentParser(prog="slimfit-ds merge", description=main.__doc__)
    parser.add_argument("base", help="folder or hub id of the model that was fine-tuned")
    parser.add_argument(
        "delta",
        type=Path,
        nargs="+",
        help="the delta, or a folder that holds one; of several the weighted sum",
    )
    parser.add_argument("output", type=Path, help="the folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: of the model that trained, which is exact)",
    )
    parser.add_argument(
        "--weights", type=float, nargs="+", help="one for each of several deltas (default: their mean)"
    )
    arguments = parser.parse_args(argv)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    try:
        merge(
            arguments.base,
            *arguments.delta,
            output=arguments.output,
            dtype=dtype,
            weights=arguments.weights,
        )
    except (DeltaError, SafetensorError, OSError) as error:
        print(f"slimfit-ds merge: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in arguments.output.glob("*.safetensors"))
    print(f"{size:,} bytes of weights: {arguments.output}")
    return 0
