"""Put compressed activations into a model, report what was done, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from slimfit_ds.activations.blocks import find_blocks
from slimfit_ds.activations.checkpoint import resolve_codec
from slimfit_ds.activations.codecs import codec_names
from slimfit_ds.activations.config import ActivationsConfig, CodecSpec, OperationTable
from slimfit_ds.activations.installer import Installer
from slimfit_ds.activations.language_head import ChunkedLoss, chunk_language_model_loss
from slimfit_ds.activations.modules import MASKS_MADE_AGAIN
from slimfit_ds.activations.patching import Patches
from slimfit_ds.activations.report import Row, describe
from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.units import is_part

__all__ = ["CompressionHandle", "Row", "activation_problems", "compress"]


@dataclass(frozen=True)
class CompressionHandle:
    """What `compress` did to a model."""

    patches: Patches
    rows: tuple[Row, ...]
    loss: ChunkedLoss | None = None

    def report(self) -> list[Row]:
        """One row for each module that was recognised, changed or left as it is."""
        return list(self.rows)

    def remove(self) -> None:
        """Restore the model exactly: forwards, checkpoint flags, attention implementation. Twice is harmless."""
        if self.loss is not None:
            self.loss.remove()
        self.patches.undo()


def compress(model: nn.Module, config: ActivationsConfig) -> CompressionHandle:
    """Store what `model` keeps for its backward pass as `config` says.

    Forward values (of the whole batch, or of chunks of it where blocks run in chunks), parameters and `state_dict` keys
    do not change. Whether a layer trains is read from
    `requires_grad` at every forward pass. In eval mode and under `no_grad` the original code runs.

    Args:
        model: any module; transformers' models are recognised best.
        config: preset, overrides and chunk size.

    Returns:
        A handle with `report()` and `remove()`.

    Raises:
        ConfigError: a codec is unknown, a layer glob matches no module, or the loss cannot be computed in
            chunks; every problem is listed.
    """
    if problems := activation_problems(model, config):
        raise ConfigError(problems)
    installer = Installer(model, config)
    installer.run()
    rows, loss = tuple(installer.rows), None
    if config.chunk_loss_tokens is not None:
        try:
            loss = chunk_language_model_loss(model, config.chunk_loss_tokens)
        except ValueError as error:
            installer.patches.undo()
            raise ConfigError([f"activations.chunk_loss_tokens: {error}; set it to null"]) from None
    return CompressionHandle(installer.patches, rows, loss)


def activation_problems(model: nn.Module, config: ActivationsConfig) -> list[str]:
    """What is wrong with a configuration for this model, before anything is changed; a line each."""
    problems = config.unmatched_layers(name for name, _ in model.named_modules())
    tables = [config.table(), *(config.table(name) for name, _ in model.named_modules())]
    for spec in {describe(spec): spec for table in tables for _, spec in table if spec is not None}.values():
        problems += _codec_problem(spec)
    if config.compile and not _compiles_a_block(model, config, tables):
        problems.append(
            f"activations.compile is true, but no block is compiled: of preset {config.preset!r} none is recomputed "
            "whole, and something is compressed; use minimal or exact, or set compile to false"
        )
    if config.compile and any(is_part(name) for name, _ in model.named_parameters()):
        problems.append(
            "activations.compile is true, but every layer trains some of its columns: no block is ever at rest; use a "
            "policy that freezes whole layers, or set compile to false"
        )
    return problems or sorted({text for table in tables for text in _misplaced(table)})


def _compiles_a_block(model: nn.Module, config: ActivationsConfig, tables: list[OperationTable]) -> bool:
    blocks = find_blocks(model)
    plain = all(table == OperationTable() for table in tables)
    return bool(blocks) and (plain or any(config.table(name).block != "exact" for name in blocks))


def _misplaced(table: OperationTable) -> Iterator[str]:
    """Operations whose codec is made for the inputs of linear layers only."""
    for operation, spec in table:
        name = spec["name"] if isinstance(spec, dict) else spec
        if operation in {"linear", "wide_linear"} or name not in codec_names() or name.startswith("step"):
            continue
        codec = resolve_codec(spec)
        if codec is not None and codec.linear_only:
            yield f"activations.operations.{operation}: {name!r} is for linear and wide_linear only"


def _codec_problem(spec: CodecSpec) -> list[str]:
    name = spec if isinstance(spec, str) else spec["name"]
    options = {} if isinstance(spec, str) else {key: value for key, value in spec.items() if key != "name"}
    if name in {"recompute", "attention", *MASKS_MADE_AGAIN}:
        return []
    if name.startswith("step"):
        options = {"activation": "gelu", **options}
    try:
        resolve_codec({"name": name, **options})
    except (ValueError, TypeError) as error:
        return [f"activations: {error}"]
    return []
