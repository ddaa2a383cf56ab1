"""Put compressed activations into a model, report what was done, and take them out again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from slimfit_ds.activations.checkpoint import SEAM, make_checkpoint
from slimfit_ds.activations.codecs import Codec, codec_names, resolve_codec
from slimfit_ds.activations.config import ActivationsConfig, CodecSpec, OperationTable
from slimfit_ds.activations.hf_attention import AttentionSetting, install_attention, uses_interface
from slimfit_ds.activations.hf_checkpointing import hold_checkpointing, install_hook
from slimfit_ds.activations.language_head import ChunkedLoss, chunk_language_model_loss
from slimfit_ds.activations.offload import ON_MODEL, HostInputs
from slimfit_ds.activations.ops.norm import NormKind
from slimfit_ds.activations.patch import (
    DROPOUTS,
    ActivationSetting,
    BlockSetting,
    ConsumerSetting,
    DropoutSetting,
    LinearSetting,
    NormSetting,
    Patches,
    Setting,
    install,
    is_patched,
    run_as_it_is,
    run_compressed,
)
from slimfit_ds.activations.recognise import (
    activation_name,
    find_blocks,
    find_consumers,
    has_checkpoint_hook,
    inside,
    is_attention,
    is_dropout,
    norm_kind,
    norm_width,
    weighted_input_width,
)
from slimfit_ds.activations.tile_proof import prove_tiles
from slimfit_ds.activations.tiles import seam_of
from slimfit_ds.errors import ConfigError

__all__ = ["CompressionHandle", "Row", "activation_problems", "compress"]


@dataclass(frozen=True)
class Row:
    """One module and what its tensors are stored as.

    Attributes:
        module: its name in the model.
        kind: the operation it was taken for.
        codec: what its tensors are stored as; `exact`: left to autograd.
        reason: how it was recognised, or why it was left alone.
    """

    module: str
    kind: str
    codec: str
    reason: str


def describe(spec: CodecSpec) -> str:
    """Return a codec specification in one word: `int8(group=128)`."""
    if isinstance(spec, str):
        return spec
    options = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}({options})"


@dataclass(frozen=True)
class CompressionHandle:
    """What `compress` changed in a model, and the way back."""

    patches: Patches
    rows: list[Row]
    loss: ChunkedLoss | None = None

    def report(self) -> list[Row]:
        """Return one row for each module that was recognised, changed or left as it is."""
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
    installer = _Installer(model, config)
    installer.run()
    rows, loss = installer.rows, None
    if config.chunk_loss_tokens is not None:
        try:
            loss = chunk_language_model_loss(model, config.chunk_loss_tokens)
        except ValueError as error:
            installer.patches.undo()
            raise ConfigError([f"activations.chunk_loss_tokens: {error}; set it to null"]) from None
    return CompressionHandle(installer.patches, rows, loss)


def activation_problems(model: nn.Module, config: ActivationsConfig) -> list[str]:
    """Return what is wrong with a configuration for this model, before anything is changed; a line each."""
    if any(is_patched(module) for module in model.modules()):
        return [
            "activations: this model is compressed already, by an earlier slim(), callback or engine (or is a copy of such a model): "
            "call remove() of its handle, or load the model anew"
        ]
    problems = config.unmatched_layers(name for name, _ in model.named_modules())
    tables = [config.table(), *(config.table(name) for name, _ in model.named_modules())]
    specs = {(name, describe(spec)): spec for table in tables for name, spec in table if spec is not None}
    for (operation, _), spec in specs.items():
        problems += [text for text in _codec_problem(operation, spec) if text not in problems]
    if config.compile and not _compiles_a_block(model, config, tables):
        problems.append(
            f"activations.compile is true, but no block is compiled: of preset {config.preset!r} none is recomputed "
            "whole, and something is compressed; use minimal or exact, or set compile to false"
        )
    if config.offload and not any(config.table(name).block != "exact" for name in find_blocks(model)):
        problems.append(
            f"activations.offload is true, but of preset {config.preset!r} no block is recomputed from its input, which is what "
            "lives on the host: use minimal, or operations: {block: recompute} for exact inputs, or set offload to false"
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
        codec = resolve_codec(_every(spec)[0] if operation == "block" else spec)
        if codec is not None and codec.linear_only:
            yield f"activations.operations.{operation}: {name!r} is for linear and wide_linear only"


def _codec_problem(operation: str, spec: CodecSpec) -> list[str]:
    name = spec if isinstance(spec, str) else spec["name"]
    words = {"block": ("recompute",), "probabilities": ("recompute",)}
    if operation == "consumers":
        if spec in ("exact", "attention", "gated"):
            return []
        return [f"activations: operation 'consumers' takes exact, attention or gated, got {describe(spec)!r}"]
    if operation == "block":
        spec, every = _every(spec)
        if not isinstance(every, int) or every < 1:
            return [f"activations: option 'every' of operation 'block' takes 1, 2, ..., got {every!r}"]
    if operation == "dropout":
        if spec == "exact" or spec in DROPOUTS:
            return []
        return [f"activations: operation 'dropout' takes exact, replay or philox, got {describe(spec)!r}"]
    if name in words.get(operation, ()):
        return []
    try:
        if name.startswith("step"):
            resolve_codec({"activation": "gelu", **({"name": name} if isinstance(spec, str) else spec)})
        else:
            resolve_codec(spec)
    except (ValueError, TypeError) as error:
        return [f"activations: {error}"]
    return []


def _every(spec: CodecSpec) -> tuple[CodecSpec, int]:
    """Return the codec of a block's input, and of how many blocks one stores it."""
    if isinstance(spec, str):
        return spec, 1
    return {key: value for key, value in spec.items() if key != "every"}, spec.get("every", 1)


# The derivative of these is a step function of one bit.
_ONE_BIT = {"relu"}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class _Installer:
    """Patches one model by one configuration.

    Args:
        model: the model.
        config: its activation settings.
    """

    def __init__(self, model: nn.Module, config: ActivationsConfig):
        self._model, self._config = model, config
        self.patches = Patches()
        self._host = HostInputs() if config.offload else None
        if self._host is not None:
            self.patches.set(model, ON_MODEL, self._host)
        self.rows: list[Row] = []
        self._blocks = find_blocks(model)
        self._recomputed: dict[str, nn.Module] = {}
        self._norms: dict[nn.Module, NormKind] = {}
        # Norms that modules are recomputed from, and linear layers that run again for what keeps their result.
        self._sources: set[nn.Module] = set()
        self._again: set[nn.Module] = set()

    def run(self) -> None:
        """Patch blocks, then the modules outside recomputed parts, then attention."""
        tables = {name: self._config.table(name) for name, _ in self._model.named_modules()}
        if all(table == OperationTable() for table in tables.values()):
            self.rows.append(Row("", "model", "exact", "the preset stores everything as autograd does"))
            if self._config.compile:
                for name, block in self._blocks.items():
                    self._compile(name, block, run_as_it_is)
            return
        asked = any(getattr(block, "gradient_checkpointing", False) for block in self._blocks.values())
        for name, block in self._blocks.items():
            self._block(name, block, tables[name])
        if any(has_checkpoint_hook(block) for block in self._blocks.values()):
            hold_checkpointing(self.patches, self._model, asked, bool(self._recomputed))
        self._norms = {m: kind for _, m in self._model.named_modules() if (kind := norm_kind(m)) is not None}
        for name, block in self._blocks.items():
            if name not in self._recomputed and tables[name].consumers != "exact":
                self._consumers(name, block, tables[name].consumers == "gated")
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
            if has_checkpoint_hook(block):
                # Also takes key-value caches out of training, which would keep what the codecs save.
                run = run_as_it_is if codec is None else functools.partial(run_compressed, codec, block)
                install_hook(self.patches, self._model, block, run)
            elif codec is not None:
                install(self.patches, block, BlockSetting(functools.partial(run_compressed, codec, block)))
            self.rows.append(Row(name, "product", describe(table.product), reason))
            return
        batchwise = any(isinstance(module, _BATCH_NORMS) for module in block.modules())
        stored: CodecSpec = "recompute" if batchwise else table.block
        if batchwise:
            reason += ", its input kept exactly: statistics over the batch carry an error of one row to all"
        spec, every = _every("exact" if stored == "recompute" else stored)
        # A block whose input is the remembered output of the one before it stores nothing of its own.
        position = list(self._blocks).index(name)
        remember = (position + 1) % every != 0
        config = self._config
        run = make_checkpoint(spec, config.chunk_tokens, config.chunk_forward, remember, self._host)
        if self._config.compile:
            self._compile(name, block, run)
        elif has_checkpoint_hook(block):
            install_hook(self.patches, self._model, block, run)
        if not has_checkpoint_hook(block):
            install(self.patches, block, BlockSetting(run))
        if not (self._config.compile or batchwise):
            self.patches.set(block, SEAM, seam_of(block, prove_tiles))
        self._recomputed[name] = block
        self.rows.append(Row(name, "block", describe(stored), reason))

    def _compile(self, name: str, block: nn.Module, run: Callable) -> None:
        """Let a block run compiled where it can, through `run` where it has the hook."""
        # Imports torch._dynamo, which takes seconds.
        from slimfit_ds.activations.compiled import compile_forward, through_graph

        if has_checkpoint_hook(block):
            install_hook(self.patches, self._model, block, through_graph(run, block))
        else:
            compile_forward(self.patches, block)
        self.rows.append(Row(name, "graph", "exact", "compiled while its columns train, or nothing of it"))

    def _consumers(self, name: str, block: nn.Module, gated: bool) -> None:
        again = _inputs_of_gates(block)
        if gated and not again:
            return
        widths = {m: width for m in self._norms if (width := norm_width(m)) is not None}
        own = [m for m in block.modules() if m in widths]
        width = max((widths[m] for m in own), default=0)
        self._sources |= {m for m in own if widths[m] == width}
        if gated:
            self._again |= set(again)
        for part, module in find_consumers(block, widths).items():
            if not is_attention(module):
                continue
            full = f"{name}.{part}"
            codec = resolve_codec(self._norm_codecs(self._config.table(full), careful=True)[0])
            setting = ConsumerSetting(codec, width, self._config.chunk_tokens, self._config.chunk_forward)
            reason = f"{type(module).__name__} holds weights and no norm of the block"
            self._install(full, module, setting, "consumers", "recompute", reason)
            self.patches.set(module, SEAM, seam_of(module, prove_tiles))

    @staticmethod
    def _norm_codecs(table: OperationTable, careful: bool) -> tuple[CodecSpec, CodecSpec]:
        """Return the codecs of a norm whose weight is frozen, or trains."""
        if careful and table.source_norm is not None:
            return table.source_norm, table.source_norm
        return table.norm, table.norm if table.active_norm is None else table.active_norm

    def _module(self, name: str, module: nn.Module, table: OperationTable) -> None:
        """Patch a norm, activation, dropout or weight layer, or say why not."""
        if module in self._norms:
            self._norm(name, module, table)
        elif is_dropout(module):
            if table.dropout != "exact":
                setting = DropoutSetting(DROPOUTS[str(table.dropout)])
                self._install(name, module, setting, "dropout", str(table.dropout), "nn.Dropout")
        elif (widths := weighted_input_width(module)) is not None:
            self._linear(name, module, table, widths)
        elif (function := activation_name(module)) is not None:
            self._activation(name, module, table, function)
        elif _looks_like_norm(module):
            self.rows.append(Row(name, "norm", "exact", f"{type(module).__name__} agrees with no known norm"))

    def _norm(self, name: str, module: nn.Module, table: OperationTable) -> None:
        kind = self._norms[module]
        source = module in self._sources
        frozen, active = self._norm_codecs(table, source or not inside(name, self._blocks))
        setting = NormSetting(kind, resolve_codec(frozen), resolve_codec(active), share=source)
        if setting.frozen is None and setting.active is None:
            return
        reason = f"{type(module).__name__} agrees with {'LayerNorm' if kind.centred else 'RMSNorm'}"
        self._install(name, module, setting, "norm", describe(frozen), reason)

    def _linear(self, name: str, module: nn.Module, table: OperationTable, widths: tuple[int, int]) -> None:
        kind = "wide_linear" if widths[0] > widths[1] else "linear"
        spec: CodecSpec = getattr(table, kind)
        codec, again = resolve_codec(spec), module in self._again
        if (codec is not None or again) and inside(name, self._blocks):
            reason = f"{type(module).__name__} {widths[0]} -> {widths[1]}, while it trains" + (
                "; its result comes again from the norm's" if again else ""
            )
            self._install(name, module, LinearSetting(codec, again), kind, describe(spec), reason)

    def _activation(self, name: str, module: nn.Module, table: OperationTable, function: str) -> None:
        parent = self._model.get_submodule(name.rpartition(".")[0])
        gated = _is_gated(parent) and table.product != "exact"
        spec = table.product if gated else table.activation
        if spec == "exact":
            return
        reason = f"{type(module).__name__} agrees with {function}" + (
            ", and gates a product" if gated else ""
        )
        setting = ActivationSetting(_activation_codec(spec, function), function, share=gated)
        self._install(name, module, setting, "product" if gated else "activation", describe(spec), reason)

    def _attention(self, tables: dict[str, OperationTable]) -> None:
        hooked = any(table.product != "exact" for table in tables.values())
        for name, module in self._model.named_modules():
            spec = tables[name].attention
            if not inside(name, self._blocks) or inside(name, self._recomputed):
                continue
            codec = resolve_codec(spec)
            if not uses_interface(module):
                if codec is not None and _is_innermost_attention(module):
                    reason = f"{type(module).__name__} does not use transformers' attention interface"
                    self.rows.append(Row(name, "attention", "exact", reason))
                continue
            if codec is None:
                if hooked:
                    install_attention(self.patches, module, AttentionSetting(None, None, None, None))
                continue
            stored = tables[name].probabilities
            probabilities = None if stored == "recompute" else resolve_codec(stored)
            values = codec if tables[name].values is None else resolve_codec(tables[name].values)
            setting = AttentionSetting(codec, values, probabilities, self._config.chunk_tokens)
            install_attention(self.patches, module, setting)
            reason = f"{type(module).__name__}, through transformers' attention interface"
            self.rows.append(Row(name, "attention", describe(spec), reason))


def _activation_codec(spec: CodecSpec, function: str) -> Codec:
    """Return the codec of an activation: step derivatives are made for its function."""
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


def _is_innermost_attention(module: nn.Module) -> bool:
    return is_attention(module) and not any(is_attention(m) for m in module.modules() if m is not module)


def _is_gated(module: nn.Module) -> bool:
    """Return whether a module with an activation function has the three linear layers of a gated MLP: gate, up and down."""
    return sum(weighted_input_width(child) is not None for child in module.children()) >= 3


def _inputs_of_gates(block: nn.Module) -> list[nn.Module]:
    """Return the linear layers gate and up of a block's gated MLPs."""
    found = []
    for module in block.modules():
        if _is_gated(module) and any(activation_name(child) for child in module.children()):
            layers = [(c, w) for c in module.children() if (w := weighted_input_width(c)) is not None]
            found += [layer for layer, (inner, outer) in layers if outer >= inner]
    return found


def _looks_like_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())
