"""Put compressed activations into a model, report what was done, and take them out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from slimfit_ds.activations.blocks import find_blocks, has_checkpoint_seam
from slimfit_ds.activations.checkpoint import make_checkpoint
from slimfit_ds.activations.codecs import get_codec
from slimfit_ds.activations.config import ActivationsConfig, CodecSpec
from slimfit_ds.activations.patching import Patches, original_forward

__all__ = ["CompressionHandle", "Row", "compress"]


@dataclass(frozen=True)
class Row:
    """What became of one module.

    Attributes:
        module: its name in the model.
        kind: the operation it was taken for.
        codec: what its tensors are stored as; `exact`: left alone.
        reason: how it was recognised, or why it was left alone.
    """

    module: str
    kind: str
    codec: str
    reason: str


class CompressionHandle:
    """What `compress` did to a model."""

    def __init__(self, patches: Patches, rows: list[Row]):
        self._patches = patches
        self._rows = rows

    def report(self) -> list[Row]:
        """One row for each module that was recognised, changed or not."""
        return list(self._rows)

    def remove(self) -> None:
        """Restore the model exactly: forwards, checkpoint flags, attention implementation. Twice is harmless."""
        self._patches.undo()


def compress(model: nn.Module, config: ActivationsConfig) -> CompressionHandle:
    """Store what `model` keeps for its backward pass as `config` says.

    Forward values, parameters and `state_dict` keys do not change. Whether a layer trains is read from
    `requires_grad` at every forward pass. In eval mode and under `no_grad` the original code runs.

    Args:
        model: any module; transformers' models are recognised best.
        config: preset, overrides and chunk size.

    Returns:
        A handle with `report()` and `remove()`.

    Raises:
        ValueError: a codec is unknown, or a layer glob matches no module; every problem is listed.
    """
    problems = config.unmatched_layers(name for name, _ in model.named_modules())
    tables = [config.table(), *(config.table(name) for name, _ in model.named_modules())]
    for spec in {_describe(spec): spec for table in tables for _, spec in table}.values():
        problems += _codec_problem(spec)
    if problems:
        raise ValueError("\n".join(problems))
    patches, rows = Patches(), []
    blocks = find_blocks(model)
    for name, block in blocks.items():
        spec = config.table(name).block
        rows.append(Row(name, "block", _describe(spec), f"repeated block {type(block).__name__}"))
        if spec != "exact":
            spec = "exact" if spec == "recompute" else spec
            _install_block(
                patches, model, block, make_checkpoint(spec, config.chunk_tokens, config.chunk_forward)
            )
    return CompressionHandle(patches, rows)


def _install_block(patches: Patches, model: nn.Module, block: nn.Module, function: Callable) -> None:
    """Run the block through `function(forward, *args)` while it trains."""
    if not has_checkpoint_seam(block):
        patches.set(block, "_slimfit_run", function)
        patches.replace_forward(block, _block_forward)
        return
    patches.set(block, "gradient_checkpointing", True)
    patches.set(block, "_gradient_checkpointing_func", function)
    # Some models look at their own flag before they hand a cache to a block.
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing") and any(child is block for child in module.modules()):
            patches.set(module, "gradient_checkpointing", True)


def _block_forward(self: nn.Module, *args, **kwargs):
    if not self.training:
        return original_forward(self)(*args, **kwargs)
    return self.__dict__["_slimfit_run"](original_forward(self), *args, **kwargs)


def _describe(spec: CodecSpec) -> str:
    if isinstance(spec, str):
        return spec
    options = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}({options})"


def _codec_problem(spec: CodecSpec) -> list[str]:
    name, options = (
        (spec, {})
        if isinstance(spec, str)
        else (spec["name"], {k: v for k, v in spec.items() if k != "name"})
    )
    if name in {"recompute", "replay"}:
        return []
    if name.startswith("step"):
        options = {"activation": "gelu", **options}
    try:
        get_codec(name, **options)
    except (ValueError, TypeError) as error:
        return [f"activations: {error}"]
    return []
