"""Frozen weights live on the host; blocks take turns in a few buffers of the device.

A frozen weight never changes, so it travels one way: there is nothing to write back. While a block computes, its
parameters are views into a buffer of the device; otherwise they are views into the host's copy, so that `state_dict`,
checkpoints, `load_state_dict`, pickle and copies of the model find whole weights as ever. The output layer is one more
block, larger than the others, and has all buffers for itself while it computes.

What autograd would keep by reference to a weight would be wrong as soon as the buffer is reused. Within a block a view of
the buffer is therefore kept as its place in the block, and looked up again, in whatever buffer the block has by then, when
the backward pass asks for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from slimfit_ds.streaming.blocks import Block, Buffer, padded
from slimfit_ds.streaming.config import FrozenWeightsConfig
from slimfit_ds.streaming.copies import Copies, pin
from slimfit_ds.streaming.find import find_streamed
from slimfit_ds.streaming.rows import Rows

__all__ = ["Streaming", "stream", "streaming_of"]

_ON_MODEL = "slimfit_streaming"
"""Attribute of a model: its `Streaming`, which `memory.tracker` reads too."""
_PAGE = 4096
"""Bytes; pieces of shared memory begin on a page, so that each can be page-locked."""
_ON_OWNER = "_slimfit_block"
"""Attribute of a module that holds streamed weights: their `Block` or `Rows`."""


class Streaming:
    """The streamed blocks of a model and their buffers on the device.

    Attributes:
        device: where they compute; follows `model.to(...)`.
        blocks: in model order.
        tables: word embeddings.
        buffers: on the device; least recently used first.
        copied: bytes of blocks that were copied to the device so far.
    """

    def __init__(self, model: nn.Module, config: FrozenWeightsConfig):
        self._model, self._config = model, config
        self.device = next(model.parameters()).device
        self.buffers: list[Buffer] = []
        self.copied = 0
        self._handles: list[Any] = []
        self._owners: list[nn.Module] = []
        self.blocks: list[Block] = []
        found = find_streamed(model, config)
        for name, (module, parameters) in found.blocks.items():
            columns = found.columns.get(name, [])
            block = Block(self, name, module, parameters, columns)
            self.blocks.append(block)
            self._hook(module, block)
        self._head = self.blocks[-1] if found.head else None
        self._whole: Buffer | None = None
        """All buffers together, for the output layer."""
        self.tables = [Rows(self, weight, modules) for weight, modules in found.tables]
        for table in self.tables:
            self._handles += table.hook()
            for embedding in table.modules:
                self._own(embedding, table)
        self._position = {block: position for position, block in enumerate(self.blocks)}
        model.__dict__[_ON_MODEL] = self
        self._tells_device = [
            m for m in model.modules() if isinstance(getattr(type(m), "device", None), property)
        ]
        for each in self._tells_device:
            each.__dict__[_ON_MODEL] = self
            each.__class__ = _telling_class(type(each))  # type: ignore[arg-type]

    def _hook(self, module: nn.Module, block: Block) -> None:
        own = {id(parameter) for parameter in block.parameters}
        for part in module.modules():
            if not any(id(parameter) in own for parameter in part.parameters()):
                continue
            self._handles.append(part.register_forward_pre_hook(block.enter, prepend=True))
            self._handles.append(part.register_forward_hook(block.leave, always_call=True))
            if any(id(parameter) in own for parameter in part.parameters(recurse=False)):
                self._own(part, block)

    def _own(self, module: nn.Module, owner: Block | Rows) -> None:
        self._owners.append(module)
        module.__dict__[_ON_OWNER], module.__dict__["_apply"] = owner, MethodType(_apply, module)

    @property
    def host_tensors(self) -> list[Tensor]:
        """What is on the host, each piece once."""
        pieces = [piece for block in self.blocks for piece in block.host_tensors]
        return pieces + [table.weight.data for table in self._own_tables()]

    def _own_tables(self) -> list[Rows]:
        """Those whose weight is not the output layer's too."""
        of_blocks = {id(p) for block in self.blocks for p in block.parameters}
        return [table for table in self.tables if id(table.weight) not in of_blocks]

    @property
    def device_tensors(self) -> list[Tensor]:
        """The memory of all buffers."""
        return [self._memory] if self.buffers else []

    def fetch(self, block: Block) -> Tensor:
        """Have a block on the device, and the next ones on their way.

        Returns:
            The buffer `[bytes]`, for what is computed right away.
        """
        if block not in self._position:
            raise RuntimeError(
                f"the weights of {block.name} were put back (remove) between a forward pass and its backward pass: do it after "
                "the backward pass"
            )
        if not block.on_device and block.was_replaced():
            block.take()
            self.drop_buffers()
        buffer = self._load(block, [block])
        if buffer is None:
            raise RuntimeError(
                f"slimfit.frozen_weights.buffers {self._config.buffers}: as many blocks compute within each other, and "
                f"{block.name} finds no buffer; give one more"
            )
        for started in buffer.started:
            self._copies.wait(started)
        buffer.started = []
        if buffer in self.buffers:
            self.buffers.append(self.buffers.pop(self.buffers.index(buffer)))
        # In the backward pass, and in what is computed again there, blocks come in reverse.
        step = -1 if torch._C._current_graph_task_id() != -1 else 1
        first = self._position[block]
        places = range(first, first + step * len(self.buffers), step)
        wanted = [self.blocks[place] for place in places if 0 <= place < len(self.blocks)]
        for other in wanted[1:]:
            self._load(other, wanted)
        return buffer.memory

    def _load(self, block: Block, wanted: Sequence[Block]) -> Buffer | None:
        """Start to copy a block into the buffer that was not used for longest, unless one holds it as it is now."""
        if not self.buffers:
            self._make_buffers()
        versions = block.versions
        buffer = next((each for each in [*self.buffers, self._whole] if each and each.block is block), None)
        if buffer is not None and buffer.versions == versions:
            return buffer
        buffer = buffer or self._room_for(block, wanted)
        if buffer is not None:
            for other in self.buffers if buffer is self._whole else [self._whole]:
                if other is not None:
                    other.block = None
            buffer.block, buffer.versions = block, versions
            parts = buffer.memory[: block.nbytes].split([source.nbytes for source in block.sources])
            buffer.started = [self._copies.start(*pair) for pair in zip(parts, block.sources, strict=True)]
            self.copied += block.nbytes
        return buffer

    def _room_for(self, block: Block, wanted: Sequence[Block]) -> Buffer | None:
        """The buffer that was not used for longest and whose block is not needed just now."""

        def is_free(buffer: Buffer | None) -> bool:
            return (
                buffer is None or buffer.block is None or not (buffer.block.in_use or buffer.block in wanted)
            )

        if block is self._head:
            return self._whole if all(map(is_free, self.buffers)) else None
        return next(filter(is_free, self.buffers), None) if is_free(self._whole) else None

    def _make_buffers(self) -> None:
        for block in self.blocks:
            if not block.on_device and block.was_replaced():
                block.take()
        self._copies = Copies(self.device)
        others = [block for block in self.blocks if block is not self._head]
        size = max(padded(block.nbytes) for block in others)
        count = min(self._config.buffers, len(others))
        whole = self._head.nbytes if self._head is not None else 0
        # The output layer's copy may begin where that of the first buffer does.
        self._memory = torch.empty(max(count * size, whole), dtype=torch.uint8, device=self.device)
        self.buffers = [Buffer(self._memory[i * size : (i + 1) * size]) for i in range(count)]
        self._whole = Buffer(self._memory) if self._head is not None else None
        if self.device.type == "cuda":
            self._lock_pages()

    def _lock_pages(self) -> None:
        """Page-lock what is on the host as far as the system lets us."""
        pieces = [(block, piece) for block in self.blocks for piece in block.pieces]
        failed = sum(piece.nbytes for block, piece in pieces if not pin(block, piece))
        if failed:
            warnings.warn(
                f"slimfit.frozen_weights: {failed / 2**30:.2f} GiB of host memory could not be page-locked (ulimit -l); "
                "blocks are copied from it, but not beside the computation",
                stacklevel=2,
            )

    def drop_buffers(self) -> None:
        """Forget what is on the device."""
        if self.buffers:
            self._copies.finish()
            del self._memory
        self.buffers, self._whole = [], None

    def finish_gradients(self) -> None:
        """Wait for the gradients of columns on the host, before the host reads them."""
        if self.device.type == "cuda" and any(len(b.pieces) > 1 for b in self.blocks):
            torch.cuda.current_stream(self.device).synchronize()

    def send(
        self, broadcast: Callable[[Tensor], Any], share: Callable[[int], tuple[Tensor, bool] | None]
    ) -> None:
        """Give all ranks one rank's frozen weights, block by block through the device, on which messages travel.

        Args:
            broadcast: makes flat bytes on the device those of that rank, in place.
            share: `copies.node_memory` of so many bytes.
        """
        for block in self.blocks:
            # A cast may have come between.
            block.lay_out()
        sizes = [padded(block.frozen_nbytes, _PAGE) for block in self.blocks]
        shared = share(sum(sizes))
        memory, fills = shared or (None, True)
        for block, size in zip(self.blocks, sizes, strict=True):
            if memory is not None:
                own, memory = memory[: block.frozen_nbytes], memory[size:]
                block.take(own, fills)
        for block in self.blocks:
            found = self.fetch(block)[: block.nbytes]
            broadcast(found)
            parts = found.split([source.nbytes for source in block.sources])
            for i, (source, part) in enumerate(zip(block.sources, parts, strict=True)):
                if fills or i:
                    source.copy_(part)
        self.drop_buffers()
        for table in self._own_tables():
            table.send(broadcast)
        if shared is not None:
            # Nobody reads before it is filled.
            broadcast(torch.zeros(1, dtype=torch.uint8, device=self.device))

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Let streamed parameters be empty tensors on the device, for code that sends all parameters of a model."""
        owners: list[Block | Rows] = [*self.blocks, *self._own_tables()]
        held = [(p, p.data) for owner in owners for p in owner.parameters]
        for parameter, data in held:
            parameter.data = torch.empty(0, dtype=data.dtype, device=self.device)
        try:
            yield
        finally:
            for parameter, data in held:
                parameter.data = data

    def leave_parameters(self) -> None:
        """Let streamed weights be buffers of their modules from now on: ZeRO 3 cuts every parameter, and nothing else."""
        for module in self._owners:
            for name in _streamed_names(module, module._parameters):
                module._buffers[name] = module._parameters.pop(name)

    def move(self, device: torch.device) -> None:
        """Compute on another device from now on."""
        if device != self.device:
            self.drop_buffers()
            self.device = device

    def remove(self) -> None:
        """Put all weights back onto the device. Twice is harmless."""
        for handle in self._handles:
            handle.remove()
        for module in self._owners:
            for name in _streamed_names(module, module._buffers):
                module._parameters[name] = cast(nn.Parameter, module._buffers.pop(name))
            del module.__dict__[_ON_OWNER], module.__dict__["_apply"]
        self._handles, self._owners = [], []
        self.drop_buffers()
        self.finish_gradients()
        for table in self._own_tables():
            table.weight.data = table.weight.data.to(self.device, copy=True)
        for block in self.blocks:
            block.take_home(self.device)
        self.blocks, self.tables, self._position, self._head = [], [], {}, None
        for each in self._tells_device:
            each.__class__ = each.whole_class  # type: ignore[assignment]
            each.__dict__.pop(_ON_MODEL, None)
        self._tells_device = []
        self._model.__dict__.pop(_ON_MODEL, None)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    """What a copy of the model has in place of its streaming."""


def _streamed_names(module: nn.Module, tensors: Mapping[str, Tensor | None]) -> list[str]:
    """Names of those of a module's own tensors that are streamed."""
    own = {id(p) for p in module.__dict__[_ON_OWNER].parameters}
    return [name for name, tensor in tensors.items() if id(tensor) in own]


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Take the place of `nn.Module._apply`: moving the model moves the buffers, and leaves streamed weights on the host."""
    owner = self.__dict__[_ON_OWNER]
    streamed: dict[str, Any] = {}
    kept = [(tensors, dict(tensors)) for tensors in (self._parameters, self._buffers)]
    for tensors, _ in kept:
        streamed |= {name: tensors.pop(name) for name in _streamed_names(self, tensors)}
    try:
        type(self)._apply(self, fn, recurse)
    finally:
        # In the order that they had.
        for tensors, before in kept:
            moved = {**tensors, **streamed}
            tensors.clear()
            tensors.update({name: moved[name] for name in before})
    for parameter in streamed.values():
        probe = fn(torch.empty(0, dtype=parameter.dtype, device=owner.streaming.device))
        if probe.dtype != parameter.dtype:
            parameter.data = parameter.data.to(probe.dtype)
        owner.streaming.move(probe.device)
    return self


class _TellsDevice:
    """A model that says where it is by its first parameter, which is on the host: in front of its class by `Streaming`."""

    whole_class: type[nn.Module]

    @property
    def device(self) -> torch.device:
        streaming = self.__dict__.get(_ON_MODEL)
        return super().device if streaming is None else streaming.device  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.whole_class.__new__, (self.whole_class,), self.__dict__


@cache
def _telling_class(whole: Any) -> type[nn.Module]:
    attributes = {"whole_class": whole, "__doc__": whole.__doc__, "__module__": whole.__module__}
    return type(whole.__name__, (_TellsDevice, whole), attributes)


def streaming_of(model: nn.Module) -> Streaming | None:
    """The streaming of a model; None: its weights are where they are."""
    return model.__dict__.get(_ON_MODEL)


def stream(model: nn.Module, config: FrozenWeightsConfig) -> Streaming | None:
    """Let the frozen weights of a model's blocks live where the configuration says; once more is harmless.

    Args:
        model: as `prepare_units` left it: a weight that does not require a gradient now never trains.
        config: the `frozen_weights` block, without `streaming_problems`.

    Returns:
        What `remove` undoes it with; None: they stay on the device.
    """
    if config.live != "host":
        return None
    return streaming_of(model) or Streaming(model, config)
