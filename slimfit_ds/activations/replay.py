"""What a function needs to run again and give the same: its random numbers, its autocast setting, buffers that it changes, and, in
chunks of the batch and tiles of the sequence, its arguments taken apart and its results joined.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

__all__ = [
    "AutocastState",
    "Call",
    "Chunks",
    "Merged",
    "NotTokenwise",
    "Piece",
    "RngState",
    "States",
    "Tiles",
    "buffers_of",
    "capture",
    "changing",
    "consumed_since",
    "first_tokens",
    "is_opaque",
    "plan_chunks",
    "put_back",
    "replayed",
    "restore",
    "take_counters",
]


@dataclass(frozen=True)
class RngState:
    """States of the CPU generator and of the generators of some accelerator devices."""

    cpu: Tensor
    devices: tuple[tuple[torch.device, Tensor], ...] = ()


States = list[RngState | None]
"""Of the pieces of a pass, one after the other; `None`: of one that draws nothing."""


def capture(tensors: Iterable[Tensor]) -> RngState | None:
    """Return the states of every generator that an operation on `tensors` could draw from.

    Returns:
        The states, or `None` for fake and meta tensors, which draw nothing.
    """
    devices: dict[torch.device, None] = {}
    for tensor in tensors:
        if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
            return None
        if tensor.device.type != "cpu":
            devices.setdefault(tensor.device)
    states = tuple((device, _module_of(device).get_rng_state(device)) for device in devices)
    return RngState(torch.get_rng_state(), states)


def consumed_since(before: RngState | None, tensors: Iterable[Tensor]) -> bool:
    """Return whether a generator has moved since `before` was captured."""
    after = capture(tensors) if before is not None else None
    if before is None or after is None:
        return False
    pairs = zip(before.devices, after.devices, strict=True)
    return not torch.equal(before.cpu, after.cpu) or any(not torch.equal(b[1], a[1]) for b, a in pairs)


def restore(state: RngState | None) -> None:
    """Set the generators back to `state`."""
    if state is not None:
        torch.set_rng_state(state.cpu)
        for device, value in state.devices:
            _module_of(device).set_rng_state(value, device)


@contextlib.contextmanager
def replayed(state: RngState | None) -> Iterator[None]:
    """Draw the random numbers that followed `state` again; the generators are left as they were found."""
    if state is None:
        yield
        return
    devices = tuple((device, _module_of(device).get_rng_state(device)) for device, _ in state.devices)
    found = RngState(torch.get_rng_state(), devices)
    restore(state)
    try:
        yield
    finally:
        restore(found)


def take_counters(device: torch.device, count: int) -> tuple[int, int]:
    """Return seed and first of `count` counters of Philox that nothing else draws from, taken from the device's generator.

    The generator moves on, so that a recomputation which puts its state back takes the same ones. The host waits for
    nothing. Where the generator is no Philox (a CPU's), the seed is drawn from it and the first counter is 0.
    """
    if device.type != "cuda":
        return int(torch.randint(1 << 62, (), device=device)), 0
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    # PyTorch counts numbers of 32 bits, of which a counter gives four.
    first = -(-generator.get_offset() // 4)
    generator.set_offset(4 * (first + count))
    return generator.initial_seed(), first


Buffers = dict[tuple[nn.Module, str], tuple[Tensor, int]]
"""Buffers and their versions, by module and name."""


def buffers_of(module: nn.Module) -> Buffers:
    """Return the buffers of a module and its parts."""
    return {
        (part, name): (buffer, buffer._version)
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    }


def changing(before: Buffers, module: nn.Module) -> Buffers:
    """Return the buffers of those parts of a module that have changed one since `before`, as BatchNorm its statistics.

    Of a part all are returned: PyTorch counts no version for running means and variances.
    """
    now = buffers_of(module)
    parts = {
        key[0] for key, (b, v) in now.items() if before.get(key, (None, 0))[0] is not b or before[key][1] != v
    }
    return {key: value for key, value in now.items() if key[0] in parts}


@contextlib.contextmanager
def put_back(buffers: Buffers) -> Iterator[None]:
    """Leave buffers as they were found, whatever runs."""
    kept = {key: (buffer, buffer.detach().clone()) for key, (buffer, _) in buffers.items()}
    try:
        yield
    finally:
        for (part, name), (buffer, before) in kept.items():
            part._buffers[name] = buffer
            # Graphs may have saved it: no new version.
            buffer.data.copy_(before)


def _module_of(device: torch.device):
    """Return `torch.cuda` for a CUDA device, and likewise for the others."""
    return getattr(torch, device.type)


@dataclass(frozen=True)
class AutocastState:
    """Device type, whether autocast is on, and its dtype, for each device type in use."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def capture(cls, tensors: Iterable[Tensor]) -> AutocastState:
        """Return the settings in force for the devices of `tensors`."""
        kinds = sorted({t.device.type for t in tensors} - {"meta"} | {"cpu"})
        return cls(
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds)
        )

    @contextlib.contextmanager
    def entered(self):
        """Run under these settings, without autocast's cache of cast weights.

        The cache would hand a cast weight, with its place in a graph that is thrown away, to a later user of the
        same (tied) weight.
        """
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.settings:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            yield


Piece = Callable[[Callable[[], Any], Sequence[Tensor]], Any]
"""Runs a part of a pass, `piece(run, inputs)`: with or without a graph, with random numbers to record or to replay."""


class Call:
    """A function with its arguments taken apart into tensors and the rest."""

    def __init__(self, function: Callable, args: tuple, kwargs: dict[str, Any], recompute: Callable | None):
        leaves, self._structure = pytree.tree_flatten((args, kwargs), is_leaf=is_opaque)
        self._function, self._again = function, recompute or function
        holders = (getattr(function, "__self__", None), *leaves)
        self.owner = next((x for x in holders if isinstance(x, nn.Module)), function)
        self._positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.tensors: list[Tensor] = [leaves[i] for i in self._positions]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # What the forward pass has changed, and the repetition must not change again.
        self.changing: Buffers = {}

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """Return the function's results for these tensors."""
        return self._call(self._function, tensors)

    def run_again(self, tensors: Sequence[Tensor]) -> Any:
        """Do the same in the backward pass."""
        with put_back(self.changing):
            return self._call(self._again, tensors)

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[Callable, tuple, dict[str, Any]]:
        """Return the function, and its arguments with other tensors in place of its own."""
        leaves = list(self._leaves)
        for position, tensor in zip(self._positions, tensors, strict=True):
            leaves[position] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return self._function, args, kwargs

    def _call(self, function: Callable, tensors: Sequence[Tensor]) -> Any:
        _, args, kwargs = self.with_tensors(tensors)
        return function(*args, **kwargs)


def is_opaque(value: Any) -> bool:
    """Caches and other objects are passed on as they are, even if they are registered as trees."""
    return not isinstance(value, (tuple, list, dict))


class NotTokenwise(Exception):
    """A block does more with its tokens than to let them attend to each other; the message completes "tokens ..."."""


@dataclass(frozen=True)
class Tiles:
    """Token ranges of every sample, and which dimension of each argument is that of tokens.

    Attributes:
        tokens: of a sample.
        bounds: first token and end of each tile.
        dims: for each argument its dimension of tokens; `None`: it is not cut.
    """

    tokens: int
    bounds: tuple[tuple[int, int], ...]
    dims: tuple[int | None, ...]

    def slice(self, tensors: Sequence[Tensor], index: int) -> list[Tensor]:
        """Return the arguments of one tile."""
        start, stop = self.bounds[index]
        return [
            t if d is None else t.narrow(d, start, stop - start)
            for t, d in zip(tensors, self.dims, strict=True)
        ]


@dataclass(frozen=True)
class Chunks:
    """Row ranges of the batch, and which arguments have a row for each sample.

    Attributes:
        batch: rows of the whole batch.
        bounds: first row and end of each chunk.
        divided: for each argument, whether it is split.
        tiles: of which each chunk consists; `None`: of one.
    """

    batch: int
    bounds: tuple[tuple[int, int], ...]
    divided: tuple[bool, ...]
    tiles: Tiles | None = None

    def __len__(self) -> int:
        return len(self.bounds)

    def undivided(self) -> Chunks:
        """Return the same arguments in one piece."""
        return Chunks(self.batch, ((0, self.batch),), (False,) * len(self.divided))

    def untiled(self) -> Chunks:
        """Return the same chunks of whole samples."""
        return replace(self, tiles=None)

    def slice(self, tensors: Sequence[Tensor], index: int) -> list[Tensor]:
        """Return the arguments of one chunk."""
        start, stop = self.bounds[index]
        return [t[start:stop] if split else t for t, split in zip(tensors, self.divided, strict=True)]

    def first_rows(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        """Return which rows of a hidden state [batch * tokens, width] belong to the first chunk or tile."""
        hidden = next((t for t in tensors if t.is_floating_point() and t.dim() >= 2), None)
        if hidden is None:
            return 0, 0
        start, stop = self.bounds[0]
        return (
            (0, (stop - start) * hidden.shape[1:-1].numel()) if self.tiles is None else self.tiles.bounds[0]
        )

    def is_batched(self, whole: Tensor) -> bool:
        """Return whether a result of the whole batch has a row for each sample."""
        return whole.dim() > 0 and whole.shape[0] == self.batch

    def region(self, argument: int, whole: Tensor, index: int, tile: int | None) -> Tensor:
        """Return the view of a whole argument that a chunk, or a tile of it, has of it."""
        start, stop = self.bounds[index]
        view = whole[start:stop] if self.divided[argument] else whole
        if tile is None or self.tiles is None or (dim := self.tiles.dims[argument]) is None:
            return view
        first, end = self.tiles.bounds[tile]
        return view.narrow(dim, first, end - first)


class Merged:
    """Results of the whole batch, filled in chunk by chunk, so that no chunk's own result outlives it.

    A tensor with a row for each sample of its chunk is joined; of anything else the first chunk's is kept.

    Args:
        plan: the chunks.
    """

    def __init__(self, plan: Chunks):
        self._plan = plan
        self._joins: list[bool] = []
        self.values: list[Any] = []

    @property
    def by_row(self) -> bool:
        """Whether every tensor so far has a row for each sample, or there is one chunk only."""
        return len(self._plan) == 1 or all(
            joins or not isinstance(value, Tensor)
            for value, joins in zip(self.values, self._joins, strict=True)
        )

    def add(self, index: int, results: Sequence[Any]) -> None:
        """Take in the results of chunk `index`; the chunks come in order.

        Raises:
            ValueError: results of two chunks differ in more than their rows.
        """
        start, stop = self._plan.bounds[index]
        if not index:
            self._joins = [len(self._plan) > 1 and _has_rows(v, stop - start) for v in results]
            self.values = [
                v.new_empty((self._plan.batch, *v.shape[1:])) if joins else v
                for v, joins in zip(results, self._joins, strict=True)
            ]
        for i, value in enumerate(results):
            if not self._joins[i]:
                continue
            whole = self.values[i]
            if not _has_rows(value, stop - start):
                # Its length was that of the first chunk by chance.
                self._joins[i], self.values[i] = False, whole[: self._plan.bounds[0][1]]
                continue
            if value.shape[1:] != whole.shape[1:]:
                raise ValueError(
                    f"results of two chunks differ: shapes {[*whole.shape[1:]]} and {[*value.shape[1:]]} of a sample"
                )
            whole[start:stop] = value


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def plan_chunks(tensors: Sequence[Tensor], chunk_tokens: int | None, tiled: bool = False) -> Chunks:
    """Return chunks of about `chunk_tokens` tokens: of as many samples as have so many, of one sample where it has more.

    The first floating-point tensor is the hidden state. Only one of rank three or more, `[batch, tokens, hidden]`,
    is split: rows of a matrix may be tokens of one packed sequence that attend to each other.

    Args:
        tensors: the arguments of a function.
        chunk_tokens: target size of a chunk in tokens; `None`: one chunk.
        tiled: a sample of more tokens is cut into tiles of at most `chunk_tokens`, the last one shorter.

    Raises:
        ValueError: `chunk_tokens` is not positive.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be a positive number of tokens or None, got {chunk_tokens}")
    hidden = next((t for t in tensors if t.is_floating_point() and t.dim() >= 2), None)
    if hidden is None:
        return Chunks(1, ((0, 1),), (False,) * len(tensors))
    batch = hidden.shape[0]
    whole = Chunks(batch, ((0, batch),), (False,) * len(tensors))
    if chunk_tokens is None or hidden.dim() < 3 or not hidden.numel():
        return whole
    length = hidden.shape[1]
    # A [sequence, ...] table cannot be told from a [batch, ...] one when both lengths agree.
    if batch == length and any(t.dim() == 2 and t.shape[0] == batch for t in tensors):
        return whole
    tiles = None
    if tiled and hidden.dim() == 3 and length > chunk_tokens:
        count = -(-length // chunk_tokens)
        size = -(-length // count)
        tiles = Tiles(
            length,
            tuple((start, min(start + size, length)) for start in range(0, length, size)),
            tuple(_dimension_of_tokens(t, batch, length) for t in tensors),
        )
    tokens = hidden.numel() // hidden.shape[-1]
    rows = max(1, chunk_tokens * batch // tokens)
    if rows >= batch:
        return replace(whole, tiles=tiles)
    bounds = tuple((start, min(start + rows, batch)) for start in range(0, batch, rows))
    return Chunks(batch, bounds, tuple(t.dim() >= 2 and t.shape[0] == batch for t in tensors), tiles)


def _dimension_of_tokens(tensor: Tensor, batch: int, tokens: int) -> int | None:
    """Return the second dimension of [batch or 1, tokens, ...], the first of [tokens, ...]; what it is is proven, not known.

    The first of [batch, ...] is that of samples, also where a batch has as many of them as a sample has tokens.
    """
    shape = tensor.shape
    if len(shape) >= 2 and shape[1] == tokens and shape[0] in (1, batch):
        return 1
    return 0 if shape and shape[0] == tokens and (len(shape) == 1 or tokens != batch) else None


def first_tokens(tensor: Tensor, tokens: int, few: int) -> Tensor:
    """Return a copy of an argument for the first `few` of so many tokens: cut in every dimension as long as the sequence, but that of samples."""
    short = tensor.detach()
    if short.dim() == 1 and short.numel() > 1 and not short.is_floating_point() and short.numel() != tokens:
        # Bounds of documents, from zero to the number of tokens.
        return short.clamp(max=few)
    for dim, length in enumerate(short.shape):
        if length == tokens and (dim or short.dim() == 1 or short.shape[-1] != tokens):
            short = short.narrow(dim, 0, few)
    return short.clone().requires_grad_(tensor.requires_grad)
