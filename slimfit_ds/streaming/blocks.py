"""A block of a model whose frozen weights live on the host: its copy there, and its views of a buffer while it computes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimfit_ds.trainable.split import SplitModule

__all__ = ["Block", "Buffer", "padded"]

_ALIGNMENT = 256
"""Bytes; as torch's allocators align: kernels choose by it, and the result shall have the same bits."""


class _Fetches(Protocol):
    device: torch.device

    def fetch(self, block: Block) -> Tensor: ...
    def finish_gradients(self) -> None: ...


def padded(nbytes: int, alignment: int = _ALIGNMENT) -> int:
    """As many bytes, up to the next multiple of the alignment."""
    return -(-nbytes // alignment) * alignment


class Buffer:
    """Room for one block on the device."""

    def __init__(self, memory: Tensor):
        self.memory = memory
        self.block: Block | None = None
        self.versions: list[int] = []
        self.started: list[Any] = []


@dataclass(frozen=True)
class _Place:
    """A view of a block's weights, in whatever buffer the block has.

    Attributes:
        start: byte of the block.
        weight: which of the block's weights must have its trained columns up to date in it; None: whoever reads the view
            sees to it.
    """

    block: Block
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    start: int
    weight: int | None

    def view(self) -> Tensor:
        assert self.block.streaming is not None
        memory = self.block.streaming.fetch(self.block)
        if self.weight is not None:
            layer = self.block.layers[self.weight]
            layer.split.fill(self.block.weight_in(memory, self.weight), self.block.columns_of(layer))
        memory = memory[self.start : self.block.nbytes].view(self.dtype)
        return memory.as_strided(self.size, self.stride, memory.storage_offset())


class Block:
    """The streamed parameters of one block, and their copy on the host: frozen weights, and behind them the trained columns
    of split layers, if these live there too.

    In the graph of a step a leaf without memory stands for columns on the host. Its gradient is made on the device, as that
    of any parameter, and goes to theirs.

    Its `enter` and `leave` are hooks of the block and of every module within that holds some of its weights: in the
    backward pass a part of the block may be computed again alone.
    """

    streaming: _Fetches | None
    """None: of a copy of the model, which is not streamed."""

    def __init__(
        self,
        streaming: _Fetches,
        name: str,
        module: nn.Module,
        weights: Sequence[nn.Parameter],
        splits: Sequence[SplitModule] = (),
    ):
        self.streaming, self.name, self.weights = streaming, name, list(weights)
        self.parameters = self.weights + [layer.weight_columns for layer in splits]
        split = {m.frozen_weight: m for m in module.modules() if isinstance(m, SplitModule)}
        self.layers: dict[int, SplitModule] = {i: split[p] for i, p in enumerate(self.weights) if p in split}
        self._columns = {layer: len(self.weights) + i for i, layer in enumerate(splits)}
        self._leaves: dict[SplitModule, tuple[Any, Tensor]] = {}
        for layer in splits:
            layer.home = self
        self._open: list[Any] = []
        self._memory: Tensor | None = None
        self.pieces: list[Tensor] = []
        """On the host: frozen weights, and if they live there trained columns and their gradients. Empty: not taken yet."""
        self.lay_out()
        # What is on the host already stays as it was loaded, mapped from a file, say, until it is needed.
        if any(parameter.device.type != "cpu" for parameter in self.parameters):
            self.take()

    def lay_out(self) -> None:
        """Give each parameter its place in flat memory."""
        self.offsets, self.nbytes = [], 0
        for parameter in self.parameters:
            self.offsets.append(self.nbytes)
            self.nbytes += padded(parameter.nbytes)
        self.frozen_nbytes = self.offsets[len(self.weights)] if self._columns else self.nbytes

    def take(self, memory: Tensor | None = None, fill: bool = True) -> None:
        """Copy everything into flat pieces of host memory, of which the parameters are views from then on.

        Args:
            memory: for the frozen weights `[frozen_nbytes]`, perhaps of several ranks; None: a piece of its own.
            fill: copy them there; otherwise another rank does.
        """
        self.lay_out()
        if memory is None:
            memory = torch.empty(self.frozen_nbytes, dtype=torch.uint8)
        columns = [torch.empty(self.nbytes - self.frozen_nbytes, dtype=torch.uint8) for _ in range(2)]
        self.pieces = [memory, *(columns if self._columns else [])]
        self._views = [self._on_host(i) for i in range(len(self.parameters))]
        with torch.no_grad():
            for i, (parameter, view) in enumerate(zip(self.parameters, self._views, strict=True)):
                if fill or i >= len(self.weights):
                    view.copy_(parameter.data)
                parameter.data = view

    def _on_host(self, i: int, gradient: bool = False) -> Tensor:
        if i < len(self.weights):
            return self.weight_in(self.pieces[0], i)
        return self.weight_in(self.pieces[1 + gradient], i, self.frozen_nbytes)

    @property
    def host_tensors(self) -> list[Tensor]:
        """What is on the host."""
        return self.pieces or [parameter.data for parameter in self.parameters]

    @property
    def sources(self) -> list[Tensor]:
        """What is copied to the device, in the order in which it stands there."""
        return self.pieces[:2]

    def weight_in(self, memory: Tensor, i: int, first: int = 0) -> Tensor:
        """A parameter as a view of flat memory that begins at byte `first` of the block."""
        parameter, offset = self.parameters[i], self.offsets[i] - first
        return memory[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)

    @property
    def versions(self) -> list[int]:
        """Change when somebody writes to the weights (`load_state_dict`)."""
        return [parameter._version for parameter in self.parameters]

    def was_replaced(self) -> bool:
        """Whether the parameters are not taken yet, or somebody has given one other data: a cast, or an assignment."""
        own = [piece.untyped_storage()._cdata for piece in self.pieces]
        return any(parameter.untyped_storage()._cdata not in own for parameter in self.parameters)

    def enter(self, *_: Any) -> None:
        """Before a module of the block computes: the weights are on the device."""
        if self.streaming is None:
            return
        self._open.append(None)
        if len(self._open) == 1:
            self._memory = self.streaming.fetch(self)
            for i, parameter in enumerate(self.weights):
                parameter.data = self.weight_in(self._memory, i)
        if torch.is_grad_enabled() and (hooks := self._keep_places()) is not None:
            hooks.__enter__()
            self._open[-1] = hooks

    def leave(self, *_: Any) -> None:
        """After it, also when it failed: they are on the host again."""
        if self.streaming is None:
            return
        if (hooks := self._open.pop()) is not None:
            hooks.__exit__(None, None, None)
        if not self._open:
            self._memory = None
            for parameter, view in zip(self.weights, self._views, strict=False):
                parameter.data = view

    def columns_of(self, layer: SplitModule) -> Tensor:
        """The trained columns of a layer on the device, for what is computed right away."""
        if self.streaming is None or layer not in self._columns:
            return layer.weight_columns
        memory = self.streaming.fetch(self) if self._memory is None else self._memory
        return self.weight_in(memory, self._columns[layer])

    def leaf_of(self, layer: SplitModule) -> Tensor:
        """What stands for the trained columns of a layer in the graph: their shape on the device, without memory."""
        columns = layer.weight_columns
        if self.streaming is None:
            return columns
        kind = self.streaming.device, columns.dtype, columns.shape
        known, leaf = self._leaves.get(layer, (None, columns))
        if known != kind:
            # Whoever takes it for the columns shall notice.
            nothing = torch.full((), torch.nan, dtype=columns.dtype, device=self.streaming.device)
            leaf = nothing.expand(columns.shape).requires_grad_()
            leaf.register_post_accumulate_grad_hook(partial(self._send_gradient, layer))
            self._leaves[layer] = kind, leaf
        return leaf.requires_grad_(columns.requires_grad)

    @torch.no_grad()
    def _send_gradient(self, layer: SplitModule, leaf: Tensor) -> None:
        """Give the columns on the host the gradient that has arrived at their leaf."""
        assert self.streaming is not None
        gradient, leaf.grad = leaf.grad, None
        columns = layer.weight_columns
        if gradient is None:
            return
        if columns.grad is not None:
            self.streaming.finish_gradients()
            columns.grad.add_(gradient.to(columns.device))
            return
        memory = self._on_host(self._columns[layer], gradient=True)
        columns.grad = memory.copy_(gradient, non_blocking=True)

    def take_home(self, device: torch.device) -> None:
        """Put everything onto the device for good."""
        for layer in self._columns:
            layer.home = None
        for parameter in self.parameters:
            gradient, parameter.grad = parameter.grad, None
            parameter.data = parameter.data.to(device, copy=True)
            parameter.grad = None if gradient is None else gradient.to(device, copy=True)

    @property
    def on_device(self) -> bool:
        """Whether the parameters are views of a buffer just now."""
        return self._memory is not None

    @property
    def in_use(self) -> bool:
        """Whether a module of the block computes just now."""
        return bool(self._open)

    def _keep_places(self) -> torch.autograd.graph.saved_tensors_hooks | None:
        """Keep views of the buffer as places; everything else goes to the hooks around ours, which autograd would bypass.

        Around each module, so that ours are the inner ones also where a checkpoint's stand between block and module: it
        counts what is kept, in the forward pass and when it computes again. None: ours are the inner ones already.
        """
        assert self._memory is not None
        own, first = self._memory.untyped_storage()._cdata, self._memory.storage_offset()
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        outer_pack, outer_unpack = outer if outer is not None else (_same, _same)
        if getattr(outer_pack, "block", None) is self:
            return None

        def pack(tensor: Tensor) -> Any:
            if tensor.layout is not torch.strided or tensor.untyped_storage()._cdata != own:
                return outer_pack(tensor)
            # All buffers are of one storage.
            start = int(tensor.storage_offset()) * tensor.element_size() - first
            if not 0 <= start < self.nbytes:
                return outer_pack(tensor)
            i = bisect_right(self.offsets, start) - 1
            # Of a split layer that keeps its parameter we know that it writes the columns at each use.
            current = i in self.layers and not isinstance(tensor, nn.Parameter)
            return _Place(
                self,
                tensor.dtype,
                tensor.shape,
                tensor.stride(),
                int(start),
                i if current else None,
            )

        def unpack(packed: Any) -> Tensor:
            return packed.view() if isinstance(packed, _Place) else outer_unpack(packed)

        pack.block = self  # type: ignore[attr-defined]
        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def __deepcopy__(self, memo: Any) -> Block:
        return _detached()

    def __reduce__(self) -> tuple[Any, ...]:
        return _detached, ()


def _detached() -> Block:
    """What a copy of the model has in place of a block: it is a plain model, with its frozen weights on the host."""
    block = Block.__new__(Block)
    block.streaming, block.parameters, block.weights = None, [], []
    return block


def _same(tensor: Tensor) -> Tensor:
    return tensor
