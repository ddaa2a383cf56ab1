"""Walks over a model and puts a setting on each module that its table of operations covers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimfit_ds.activations import recognise
from slimfit_ds.activations.attention_glue import AttentionSetting, install_attention
from slimfit_ds.activations.blocks import (
    find_blocks,
    find_consumers,
    has_checkpoint_seam,
    inside,
    install_seam,
)
from slimfit_ds.activations.checkpoint import make_checkpoint, resolve_codec
from slimfit_ds.activations.codecs import Codec
from slimfit_ds.activations.compiled import compile_forward, through_graph
from slimfit_ds.activations.config import ActivationsConfig, CodecSpec, OperationTable
from slimfit_ds.activations.modules import (
    ActivationSetting,
    BlockSetting,
    ConsumerSetting,
    DropoutSetting,
    LinearSetting,
    NormSetting,
    Setting,
    install,
)
from slimfit_ds.activations.ops.attention_dropout import mask_drawing
from slimfit_ds.activations.ops.norm import NormKind
from slimfit_ds.activations.patching import Patches
from slimfit_ds.activations.report import Row, describe
from slimfit_ds.activations.saved_hooks import call_compressed

__all__ = ["Installer"]

# The derivative of these is a step function of one bit.
_ONE_BIT = {"relu"}


class Installer:
    """Patches one model by one configuration.

    Args:
        model: the model.
        config: its activation settings.
    """

    def __init__(self, model: nn.Module, config: ActivationsConfig):
        self._model, self._config = model, config
        self.patches = Patches()
        self.rows: list[Row] = []
        self._blocks = find_blocks(model)
        self._recomputed: dict[str, nn.Module] = {}
        self._norms: dict[nn.Module, NormKind] = {}

    def run(self) -> None:
        """Patch blocks, then the modules outside recomputed parts, then attention."""
        tables = {name: self._config.table(name) for name, _ in self._model.named_modules()}
        if all(table == OperationTable() for table in tables.values()):
            self.rows.append(Row("", "model", "exact", "the preset stores everything as autograd does"))
            if self._config.compile:
                for name, block in self._blocks.items():
                    self._compile(name, block, _plain)
            return
        for name, block in self._blocks.items():
            self._block(name, block, tables[name])
        self._norms = {
            m: kind for _, m in self._model.named_modules() if (kind := recognise.norm_kind(m)) is not None
        }
        for name, block in self._blocks.items():
            if name not in self._recomputed and tables[name].consumers != "exact":
                self._consumers(name, block, tables[name].consumers == "attention")
        for name, module in self._model.named_modules():
            if not inside(name, self._recomputed):
                self._module(name, module, tables[name])
        self._attention(tables)

    def _install(
        self, name: str, module: nn.Module, setting: Setting, kind: str, codec: str, reason: str
    ) -> None:
        install(self.patches, module, setting)
        self.rows.append(Row(name, kind, codec, reason))

    def _block(self, name: str, block: nn.Module, table: OperationTable) -> None:
        reason = f"repeated block {type(block).__name__}"
        if table.block == "exact":
            codec = resolve_codec(table.product)
            if has_checkpoint_seam(block):
                # Also takes key-value caches out of training, which would keep what the codecs save.
                run = _plain if codec is None else functools.partial(_run_hooked, codec, block)
                install_seam(self.patches, self._model, block, run)
            elif codec is not None:
                install(self.patches, block, BlockSetting(functools.partial(_run_hooked, codec, block)))
            self.rows.append(Row(name, "product", describe(table.product), reason))
            return
        spec = "exact" if table.block == "recompute" else table.block
        run = make_checkpoint(spec, self._config.chunk_tokens, self._config.chunk_forward)
        if self._config.compile:
            self._compile(name, block, run)
        elif has_checkpoint_seam(block):
            install_seam(self.patches, self._model, block, run)
        if not has_checkpoint_seam(block):
            install(self.patches, block, BlockSetting(run))
        self._recomputed[name] = block
        self.rows.append(Row(name, "block", describe(table.block), reason))

    def _compile(self, name: str, block: nn.Module, run: Callable) -> None:
        """Let a block run compiled while it is at rest, through `run` where it has the seam."""
        if has_checkpoint_seam(block):
            install_seam(self.patches, self._model, block, through_graph(run, block))
        else:
            compile_forward(self.patches, block)
        self.rows.append(Row(name, "graph", "exact", "compiled while none of its weights trains"))

    def _consumers(self, name: str, block: nn.Module, only_attention: bool) -> None:
        widths = {m: width for m in self._norms if (width := recognise.norm_width(m)) is not None}
        for part, module in find_consumers(block, widths).items():
            if only_attention and not _is_attention(module):
                continue
            full = f"{name}.{part}"
            codec = resolve_codec(self._config.table(full).norm)
            width = max(widths[m] for m in block.modules() if m in widths)
            setting = ConsumerSetting(codec, width, self._config.chunk_tokens, self._config.chunk_forward)
            reason = f"{type(module).__name__} holds weights and no norm of the block"
            self._install(full, module, setting, "consumers", "recompute", reason)

    def _module(self, name: str, module: nn.Module, table: OperationTable) -> None:
        """Patch a norm, activation, dropout or weight layer, or say why not."""
        if module in self._norms:
            self._norm(name, module, table)
        elif recognise.is_dropout(module):
            if table.dropout != "exact":
                setting = DropoutSetting.of(table.dropout)
                self._install(name, module, setting, "dropout", describe(table.dropout), "nn.Dropout")
        elif (widths := recognise.weighted_input_width(module)) is not None:
            self._linear(name, module, table, widths)
        elif (function := recognise.activation_name(module)) is not None:
            self._activation(name, module, table, function)
        elif _looks_like_norm(module):
            self.rows.append(Row(name, "norm", "exact", f"{type(module).__name__} agrees with no known norm"))

    def _norm(self, name: str, module: nn.Module, table: OperationTable) -> None:
        kind = self._norms[module]
        active = table.norm if table.active_norm is None else table.active_norm
        recipe = table.consumers != "exact"
        setting = NormSetting(kind, resolve_codec(table.norm), resolve_codec(active), recipe)
        if setting.frozen is None and setting.active is None:
            return
        reason = f"{type(module).__name__} agrees with {'LayerNorm' if kind.centred else 'RMSNorm'}"
        self._install(name, module, setting, "norm", describe(table.norm), reason)

    def _linear(self, name: str, module: nn.Module, table: OperationTable, widths: tuple[int, int]) -> None:
        kind = "wide_linear" if widths[0] > widths[1] else "linear"
        spec: CodecSpec = getattr(table, kind)
        if (codec := resolve_codec(spec)) is not None and inside(name, self._blocks):
            reason = f"{type(module).__name__} {widths[0]} -> {widths[1]}, while it trains"
            self._install(name, module, LinearSetting(codec), kind, describe(spec), reason)

    def _activation(self, name: str, module: nn.Module, table: OperationTable, function: str) -> None:
        gated = self._is_gate(name) and table.product != "exact"
        spec = table.product if gated else table.activation
        if spec == "exact":
            return
        reason = f"{type(module).__name__} agrees with {function}" + (
            ", and gates a product" if gated else ""
        )
        setting = ActivationSetting(_activation_codec(spec, function), recipe=gated, function=function)
        self._install(name, module, setting, "product" if gated else "activation", describe(spec), reason)

    def _is_gate(self, name: str) -> bool:
        """Whether the activation's module has three linear layers beside it: gate, up and down."""
        parent = self._model.get_submodule(name.rpartition(".")[0])
        return sum(recognise.weighted_input_width(child) is not None for child in parent.children()) >= 3

    def _attention(self, tables: dict[str, OperationTable]) -> None:
        settings: dict[nn.Module, AttentionSetting] = {}
        hooked = any(table.product != "exact" for table in tables.values())
        for name, module in self._model.named_modules():
            spec = tables[name].attention
            if not inside(name, self._blocks) or inside(name, self._recomputed):
                continue
            if not _is_attention(module) or not hasattr(module, "config"):
                continue
            codec = resolve_codec(spec)
            if codec is None:
                if hooked:
                    settings[module] = AttentionSetting(None, None, None, None)
                continue
            stored = tables[name].probabilities
            probabilities = None if stored == "recompute" else resolve_codec(stored)
            values = codec if tables[name].values is None else resolve_codec(tables[name].values)
            draw = mask_drawing(tables[name].dropout)
            settings[module] = AttentionSetting(codec, values, probabilities, self._config.chunk_tokens, draw)
            reason = f"{type(module).__name__}, through transformers' attention interface"
            self.rows.append(Row(name, "attention", describe(spec), reason))
        install_attention(self.patches, self._model, settings)


def _activation_codec(spec: CodecSpec, function: str) -> Codec:
    """The codec of an activation: step derivatives are made for its function."""
    name = spec if isinstance(spec, str) else spec["name"]
    if name.startswith("step"):
        options = (
            {} if isinstance(spec, str) else {key: value for key, value in spec.items() if key != "name"}
        )
        name = "step1" if function in _ONE_BIT else name
        spec = {"name": name, "activation": function, **options}
    codec = resolve_codec(spec)
    assert codec is not None
    return codec


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _looks_like_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _plain(function: Callable, *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def _run_hooked(codec: Codec, block: nn.Module, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Run a block with a codec for what autograd saves in it."""
    kwargs.pop("recompute", None)
    hidden = next((a for a in args if isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 1), None)
    if hidden is None or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    return call_compressed(function, codec, hidden, block.parameters(), *args, **kwargs)
