"""`slimfit-ds merge`: a base with a delta in it, as plain transformers loads it."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slimfit_ds.deltas.base import DeltaError, find_base, whole_name
from slimfit_ds.deltas.delta import Delta, check_fit, read_delta
from slimfit_ds.files import flush
from slimfit_ds.trainable.units import named_tensors

__all__ = ["load_base", "load_merged", "main", "merge", "put_in"]

_BESIDE = (".json", ".jinja", ".txt", ".model", ".md")
"""Endings of what a model's folder holds beside weights: tokenizer, chat template, generation settings."""
_OF_THE_MODEL = ("config.json", "README.md")


def load_base(folder: Path, delta: Delta) -> nn.Module:
    """Load the model that a delta is of, without the delta; its class and values of its config are the delta's.

    Raises:
        DeltaError: the class is none of transformers, or the delta lacks what the base does not have.
    """
    import transformers

    kind = getattr(transformers, delta.architecture or "", None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise DeltaError(
            f"the delta is of a {delta.architecture or 'model of your own code'}, which is no model of transformers"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _lay_over(config, delta.config)
        loaded: Any = kind.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, delta.dtype),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # of malformed configs transformers and huggingface_hub raise many
        reason = f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
        raise DeltaError(f"{folder} does not load as {delta.architecture} ({reason})") from None
    model, report = loaded
    made = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    lacking = sorted(made - set(delta.tensors))
    if lacking:
        raise DeltaError(f"neither the base nor the delta has {lacking[0]!r} ({len(lacking)} tensors)")
    check_fit(model, delta)
    return model


def _lay_over(config: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        own = getattr(config, name, None)
        if isinstance(value, Mapping) and hasattr(own, "to_dict"):
            _lay_over(own, value)
        elif name == "id2label" and isinstance(value, Mapping):
            config.id2label = {int(key): label for key, label in value.items()}
        elif name != "model_type":
            setattr(config, name, value)


@torch.no_grad()
def put_in(model: nn.Module, delta: Delta) -> None:
    """Write the values of a delta into a whole model; a weight takes the dtype of what trained in it."""
    present = dict(named_tensors(model))
    for name, values in delta.tensors.items():
        whole = whole_name(name)
        tensor = present[whole]
        if tensor.is_floating_point() and tensor.dtype != values.dtype:
            tensor.data = tensor.data.to(values.dtype)
        target = tensor if whole == name else delta.places[whole].of_weight(tensor)
        target.copy_(values)


def load_merged(base: str | Path, delta: Delta, revision: str | None = None) -> nn.Module:
    """Load a base with a delta in it: the trained model, to the bit.

    Args:
        base: folder or hub id.
        revision: on the hub.

    Raises:
        DeltaError: the base is not the one that the delta was made from.
    """
    folder, found = find_base(base, revision)
    delta.base.require(found, "the delta")
    model = load_base(folder, delta)
    put_in(model, delta)
    return model.eval()


def merge(base: str | Path, delta: str | Path, output: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a base with a delta in it: weights, config, and what the folders hold for tokenizer and generation.

    Args:
        base: folder or hub id.
        delta: file, or a folder that holds one; a tokenizer beside it goes before that of the base.
        output: a folder that is not there yet; it is there whole or not at all.
        dtype: of the weights; None: that of the model that trained, which is exact.

    Raises:
        DeltaError: see `load_merged`; or the output exists.
    """
    output = Path(output)
    if output.exists():
        raise DeltaError(f"{output} exists; choose another name")
    model: Any = load_merged(base, read_delta(delta))
    if dtype is not None:
        model = model.to(dtype)
        model.config.dtype = dtype
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        model.save_pretrained(part)
        taken = {path.name for path in part.iterdir()} | set(_OF_THE_MODEL)
        beside = Path(delta) if Path(delta).is_dir() else Path(delta).parent
        folder, _ = find_base(base)
        for source in (folder, beside):
            for path in sorted(source.iterdir()):
                if (
                    path.is_file()
                    and path.suffix in _BESIDE
                    and _belongs(path.name)
                    and path.name not in taken
                ):
                    shutil.copyfile(path, part / path.name)
        for path in part.iterdir():
            flush(path)
        part.rename(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _belongs(name: str) -> bool:
    known = (
        "token",
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
        0; 2 if base and delta do not belong together, one cannot be read, or the output exists.
    """
    parser = argparse.ArgumentParser(prog="slimfit-ds merge", description=main.__doc__)
    parser.add_argument("base", help="folder or hub id of the model that was fine-tuned")
    parser.add_argument("delta", type=Path, help="the delta, or a folder that holds one")
    parser.add_argument("output", type=Path, help="the folder to write; must not exist")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: of the model that trained, which is exact)",
    )
    arguments = parser.parse_args(argv)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    try:
        merge(arguments.base, arguments.delta, arguments.output, dtype)
    except DeltaError as error:
        print(f"slimfit-ds merge: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in arguments.output.glob("*.safetensors"))
    print(f"{size:,} bytes of weights: {arguments.output}")
    return 0
