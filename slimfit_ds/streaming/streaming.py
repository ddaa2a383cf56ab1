"""Frozen weights of blocks live on the host; the blocks take turns in a few buffers of the device.

A frozen weight never changes, so it travels one way: there is nothing to write back. While a block computes, its
parameters are views into a buffer of the device; otherwise they are views into the host's copy, so that `state_dict`,
checkpoints, `load_state_dict`, pickle and copies of the model find whole weights as ever.

What autograd would keep by reference to a weight would be wrong as soon as the buffer is reused. Within a block a view of
the buffer is therefore kept as its place in the block, and looked up again, in whatever buffer the block has by then, when
the backward pass asks for it.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from slimfit_ds.activations.recognise import find_blocks, has_checkpoint_hook
from slimfit_ds.streaming.config import FrozenWeightsConfig
from slimfit_ds.streaming.copies import Copies, pin
from slimfit_ds.trainable.split import SplitModule

__all__ = ["Streaming", "stream", "streaming_of", "streaming_problems"]

_ON_MODEL = "slimfit_streaming"
"""Attribute of a model: its `Streaming`, which `memory.tracker` reads too."""
_ON_OWNER = "_slimfit_block"
"""Attribute of a module that holds streamed weights: their block."""
_ALIGNMENT = 256
"""Bytes; as torch's allocators align: kernels choose by it, and the result shall have the same bits."""


class _Buffer:
    """Room for one block on the device."""

    def __init__(self, size: int, device: torch.device):
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.block: _Block | None = None
        self.versions: list[int] = []
        self.started: Any = None


@dataclass(frozen=True)
class _Place:
    """A view of a block's weights, in whatever buffer the block has.

    Attributes:
        weight: which of the block's weights must have its trained columns up to date in it; None: whoever reads the view
            sees to it.
    """

    block: _Block
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any
    weight: int | None

    def view(self) -> Tensor:
        assert self.block.streaming is not None
        memory = self.block.streaming.fetch(self.block)
        if self.weight is not None:
            layer = self.block.layers[self.weight]
            layer.split.fill(self.block.weight_in(memory, self.weight), layer.weight_columns)
        return memory.view(self.dtype).as_strided(self.size, self.stride, self.offset)


class _Block:
    """The streamed parameters of one block, and their copy on the host.

    Its `enter` and `leave` are hooks of the block and of every module within that holds some of its weights: in the
    backward pass a part of the block may be computed again alone.
    """

    streaming: Streaming | None
    """None: of a copy of the model, which is not streamed."""

    def __init__(
        self, streaming: Streaming, name: str, module: nn.Module, parameters: Sequence[nn.Parameter]
    ):
        self.streaming, self.name, self.parameters = streaming, name, list(parameters)
        split = {m.frozen_weight: m for m in module.modules() if isinstance(m, SplitModule)}
        self.layers: dict[int, SplitModule] = {
            i: split[p] for i, p in enumerate(self.parameters) if p in split
        }
        self._open: list[Any] = []
        self._memory: Tensor | None = None
        self.take()

    def take(self) -> None:
        """Copy the weights into one flat piece of host memory, of which they are views from then on."""
        self.offsets, self.nbytes = [], 0
        for parameter in self.parameters:
            self.offsets.append(self.nbytes)
            self.nbytes += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
        self.host = torch.empty(self.nbytes, dtype=torch.uint8)
        self._views = self._within(self.host)
        with torch.no_grad():
            for parameter, view in zip(self.parameters, self._views, strict=True):
                view.copy_(parameter.data)
                parameter.data = view

    def _within(self, memory: Tensor) -> list[Tensor]:
        """The weights as views of flat memory in which the block stands."""
        return [self.weight_in(memory, i) for i in range(len(self.parameters))]

    def weight_in(self, memory: Tensor, i: int) -> Tensor:
        """The same of one weight."""
        parameter, offset = self.parameters[i], self.offsets[i]
        return memory[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)

    @property
    def versions(self) -> list[int]:
        """Change when somebody writes to the weights (`load_state_dict`)."""
        return [parameter._version for parameter in self.parameters]

    def was_replaced(self) -> bool:
        """Whether somebody has given a parameter other data: a cast, or an assignment."""
        own = self.host.untyped_storage()._cdata
        return any(parameter.untyped_storage()._cdata != own for parameter in self.parameters)

    def enter(self, *_: Any) -> None:
        """Before a module of the block computes: the weights are on the device."""
        if self.streaming is None:
            return
        self._open.append(None)
        if len(self._open) == 1:
            self._memory = self.streaming.fetch(self)
            for parameter, view in zip(self.parameters, self._within(self._memory), strict=True):
                parameter.data = view
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
            for parameter, view in zip(self.parameters, self._views, strict=True):
                parameter.data = view

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
        own = self._memory.untyped_storage()._cdata
        outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        outer_pack, outer_unpack = outer if outer is not None else (_same, _same)
        if getattr(outer_pack, "block", None) is self:
            return None

        def pack(tensor: Tensor) -> Any:
            if tensor.layout is not torch.strided or tensor.untyped_storage()._cdata != own:
                return outer_pack(tensor)
            start = tensor.storage_offset()
            i = bisect_right(self.offsets, int(start) * tensor.element_size()) - 1
            # Of a split layer that keeps its parameter we know that it writes the columns at each use.
            current = i in self.layers and not isinstance(tensor, nn.Parameter)
            return _Place(self, tensor.dtype, tensor.shape, tensor.stride(), start, i if current else None)

        def unpack(packed: Any) -> Tensor:
            return packed.view() if isinstance(packed, _Place) else outer_unpack(packed)

        pack.block = self  # type: ignore[attr-defined]
        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def put_back(self, device: torch.device) -> None:
        """Give each parameter memory of its own on the device."""
        for parameter in self.parameters:
            parameter.data = parameter.data.to(device, copy=True)

    def __deepcopy__(self, memo: Any) -> _Block:
        return _detached()

    def __reduce__(self) -> tuple[Any, ...]:
        return _detached, ()


def _detached() -> _Block:
    """What a copy of the model has in place of a block: it is a plain model, with its frozen weights on the host."""
    block = _Block.__new__(_Block)
    block.streaming, block.parameters = None, []
    return block


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Streaming:
    """The streamed blocks of a model and their buffers on the device.

    Attributes:
        device: where they compute; follows `model.to(...)`.
        blocks: in model order.
        buffers: on the device; least recently used first.
    """

    def __init__(self, model: nn.Module, config: FrozenWeightsConfig):
        self._model, self._config = model, config
        self.device = next(model.parameters()).device
        self.buffers: list[_Buffer] = []
        self._handles: list[Any] = []
        self._owners: list[nn.Module] = []
        self.blocks: list[_Block] = []
        for name, (module, parameters) in _streamed(model, config).items():
            block = _Block(self, name, module, parameters)
            self.blocks.append(block)
            self._hook(module, block)
        self._position = {block: position for position, block in enumerate(self.blocks)}
        model.__dict__[_ON_MODEL] = self

    def _hook(self, module: nn.Module, block: _Block) -> None:
        own = {id(parameter) for parameter in block.parameters}
        for part in module.modules():
            if not any(id(parameter) in own for parameter in part.parameters()):
                continue
            self._handles.append(part.register_forward_pre_hook(block.enter, prepend=True))
            self._handles.append(part.register_forward_hook(block.leave, always_call=True))
            if any(id(parameter) in own for parameter in part.parameters(recurse=False)):
                self._owners.append(part)
                part.__dict__[_ON_OWNER], part.__dict__["_apply"] = block, MethodType(_apply, part)

    @property
    def host_tensors(self) -> list[Tensor]:
        """The flat host copies."""
        return [block.host for block in self.blocks]

    @property
    def device_tensors(self) -> list[Tensor]:
        """The buffers."""
        return [buffer.memory for buffer in self.buffers]

    def fetch(self, block: _Block) -> Tensor:
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
        self._copies.wait(buffer.started)
        buffer.started = None
        self.buffers.append(self.buffers.pop(self.buffers.index(buffer)))
        # In the backward pass, and in what is computed again there, blocks come in reverse.
        step = -1 if torch._C._current_graph_task_id() != -1 else 1
        first = self._position[block]
        places = range(first, first + step * len(self.buffers), step)
        wanted = [self.blocks[place] for place in places if 0 <= place < len(self.blocks)]
        for other in wanted[1:]:
            self._load(other, wanted)
        return buffer.memory

    def _load(self, block: _Block, wanted: Sequence[_Block]) -> _Buffer | None:
        """Start to copy a block into the buffer that was not used for longest, unless one holds it as it is now."""
        if not self.buffers:
            self._make_buffers()
        versions = block.versions
        buffer = next((buffer for buffer in self.buffers if buffer.block is block), None)
        if buffer is not None and buffer.versions == versions:
            return buffer
        for other in self.buffers:
            if buffer is None and (other.block is None or not (other.block.in_use or other.block in wanted)):
                buffer = other
        if buffer is not None:
            buffer.block, buffer.versions = block, versions
            buffer.started = self._copies.start(buffer.memory[: block.nbytes], block.host)
        return buffer

    def _make_buffers(self) -> None:
        self._copies = Copies(self.device)
        size = max(block.nbytes for block in self.blocks)
        count = min(self._config.buffers, len(self.blocks))
        self.buffers = [_Buffer(size, self.device) for _ in range(count)]
        if self.device.type != "cuda":
            return
        failed = sum(block.nbytes for block in self.blocks if not pin(block, block.host))
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
        self.buffers = []

    def send(self, broadcast: Callable[[Tensor], Any]) -> None:
        """Give all ranks one rank's frozen weights, block by block through the device, on which messages travel.

        Args:
            broadcast: makes flat bytes on the device those of that rank, in place.
        """
        for block in self.blocks:
            memory = self.fetch(block)[: block.nbytes]
            broadcast(memory)
            block.host.copy_(memory)
        self.drop_buffers()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Let streamed parameters be empty tensors on the device, for code that sends all parameters of a model."""
        held = [(p, p.data) for block in self.blocks for p in block.parameters]
        for parameter, data in held:
            parameter.data = torch.empty(0, dtype=data.dtype, device=self.device)
        try:
            yield
        finally:
            for parameter, data in held:
                parameter.data = data

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
            del module.__dict__[_ON_OWNER], module.__dict__["_apply"]
        self._handles, self._owners = [], []
        self.drop_buffers()
        for block in self.blocks:
            block.put_back(self.device)
        self.blocks, self._position = [], {}
        self._model.__dict__.pop(_ON_MODEL, None)

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    """What a copy of the model has in place of its streaming."""


def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Take the place of `nn.Module._apply`: moving the model moves the buffers, and leaves streamed weights on the host."""
    block, kept = self.__dict__[_ON_OWNER], dict(self._parameters)
    streamed = {
        name: p for name, p in kept.items() if p is not None and any(p is own for own in block.parameters)
    }
    for name in streamed:
        del self._parameters[name]
    try:
        type(self)._apply(self, fn, recurse)
    finally:
        # In the order that they had.
        moved = {**self._parameters, **streamed}
        self._parameters.clear()
        self._parameters.update({name: moved[name] for name in kept})
    for parameter in streamed.values():
        probe = fn(torch.empty(0, dtype=parameter.dtype, device=block.streaming.device))
        if probe.dtype != parameter.dtype:
            parameter.data = parameter.data.to(probe.dtype)
        block.streaming.move(probe.device)
    return self


def _streamed(
    model: nn.Module,
    config: FrozenWeightsConfig,
    frozen: Callable[[nn.Parameter], bool] = lambda p: not p.requires_grad,
) -> dict[str, tuple[nn.Module, list[nn.Parameter]]]:
    """Name -> block and its weights that do not train, of the blocks that are streamed, in model order.

    Vectors stay on the device, as do weights that a module outside of the block holds too.
    """
    holders = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    found = {}
    blocks = find_blocks(model)
    for name, block in list(blocks.items())[: max(len(blocks) - config.resident, 0)]:
        inside = Counter(id(p) for module in block.modules() for p in module.parameters(recurse=False))
        # Where a block is computed again, its forward is called without the hooks around it.
        direct = {id(p) for p in block.parameters(recurse=False)} if has_checkpoint_hook(block) else set()
        parameters = [
            p
            for p in block.parameters()
            if frozen(p)
            and id(p) not in direct
            and p.dim() > 1
            and type(p) in (nn.Parameter, FakeTensor)
            and p.is_contiguous()
            and holders[id(p)] == inside[id(p)]
        ]
        if parameters:
            found[name] = (block, parameters)
    return found


def streaming_problems(
    model: nn.Module, config: FrozenWeightsConfig, splits: bool, compiles: bool
) -> list[str]:
    """What is wrong with a `frozen_weights` block for this model, a line each; nothing is changed or loaded.

    Args:
        model: whole layers, or split ones.
        config: the block.
        splits: whether the freezing splits layers, so that a whole weight never trains.
        compiles: whether blocks run compiled.
    """
    if config.live == "device":
        return []
    problems = []
    blocks = find_blocks(model)
    found = _streamed(model, config, (lambda p: True) if splits else (lambda p: not p.requires_grad))
    if not blocks:
        problems.append(
            f"slimfit.frozen_weights.live 'host': no repeated blocks were found in {type(model).__name__}; use 'device'"
        )
    elif config.resident >= len(blocks):
        problems.append(
            f"slimfit.frozen_weights.resident {config.resident} leaves none of the {len(blocks)} blocks to stream; lower it, "
            "or set live to 'device'"
        )
    elif not found:
        problems.append(
            "slimfit.frozen_weights.live 'host' is for weights that never train, and with this freeze policy every layer of "
            "the blocks trains at some step; use policy static (the default), a width below 1, or live 'device'"
        )
    if compiles:
        problems.append(
            "slimfit.frozen_weights.live 'host': a compiled block holds on to its weights; set activations.compile to false"
        )
    parameters = [p for _, weights in found.values() for p in weights]
    if any(p.is_meta for p in parameters):
        problems.append(
            "slimfit.frozen_weights.live 'host': weights on the meta device have no values; load them first, on the CPU"
        )
    elif not any(isinstance(p, FakeTensor) for p in parameters):
        problems += _room_problems([weights for _, weights in found.values()])
    return problems


def _room_problems(blocks: Sequence[Sequence[nn.Parameter]]) -> list[str]:
    """Whether the host has room: for what is not there yet, and for one block while it is taken over."""
    sizes = [sum(p.nbytes for p in block) for block in blocks]
    new = sum(p.nbytes for block in blocks for p in block if p.device.type != "cpu")
    needed, available = new + max(sizes, default=0), psutil.virtual_memory().available
    if needed <= available:
        return []
    return [
        f"slimfit.frozen_weights.live 'host': {len(blocks)} blocks take {sum(sizes) / 2**30:.1f} GiB of host memory, for which "
        f"{needed / 2**30:.1f} GiB must be free, and {available / 2**30:.1f} GiB are; keep more blocks on the device (resident), "
        "or set live to 'device'"
    ]


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
    if config.live == "device":
        return None
    return streaming_of(model) or Streaming(model, config)
