"""Inputs of recomputed blocks live on the host between forward and backward pass.

What a block keeps (its input, encoded by the preset's codec or as it is) is copied to page-locked host memory as soon as it is
made, on a stream of its own, and comes back part by part: the rows of one chunk or tile at a time, the next ones on their way while
these compute, and the first ones of the block that is next in the backward pass. Host memory is taken from a pool that lives as
long as the model: once a step has run, none is allocated.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec, Encoded
from slimfit_ds.streaming.copies import Copies, pin

__all__ = ["ON_MODEL", "HostInputs", "HostRows", "OnHost"]

ON_MODEL = "slimfit_host_inputs"
"""Attribute of a model: its `HostInputs`, which `memory.tracker` reads too."""


@dataclasses.dataclass(eq=False)
class _Piece:
    """Flat host memory, page-locked while this lives."""

    memory: Tensor
    device: torch.device
    """Whose copies it is for: those of two devices know nothing of each other."""


class HostInputs:
    """The pool of host memory of one model, and the order in which blocks put their inputs there.

    Attributes:
        seen_by: is told of new memory (a tracker, to which a CPU's is all alike).
    """

    def __init__(self) -> None:
        self.seen_by: Callable[[Tensor], None] | None = None
        self._pieces: list[_Piece] = []
        self._free: list[_Piece] = []
        self._copies: dict[torch.device, Copies] = {}
        self._last: weakref.ref[OnHost] | None = None

    @property
    def host_tensors(self) -> list[Tensor]:
        """All memory of the pool."""
        return [piece.memory for piece in self._pieces]

    def keep(
        self,
        tensors: Sequence[Tensor],
        code: tuple[Codec, Encoded] | None,
        shape: torch.Size,
        first: tuple[int, int],
    ) -> OnHost:
        """Copy what is kept of a tensor `[..., width]` to the host.

        Args:
            tensors: contiguous, of one device.
            code: the codec that made them of it, which can take rows apart, and its description; `None`: the tensor itself.
            shape: of the tensor.
            first: rows that are asked for first.
        """
        device = tensors[0].device
        copies = self._copies.setdefault(device, Copies(device))
        piece = self._take(sum(_padded(t) for t in tensors), copies, device)
        views, offset = [], 0
        for tensor in tensors:
            target = piece.memory[offset : offset + tensor.nbytes]
            copies.start(target, tensor.detach().view(-1).view(torch.uint8))
            copies.hold(tensor)
            views.append(target.view(tensor.dtype).view(tensor.shape))
            offset += _padded(tensor)
        kept = OnHost(copies, device, views, code, shape, first, self._last)
        kept.release = weakref.finalize(kept, self._give, piece)
        self._last = weakref.ref(kept)
        return kept

    def _take(self, nbytes: int, copies: Copies, device: torch.device) -> _Piece:
        """Return the smallest free piece that is large enough, or a new one in place of those that are too small."""
        free = [piece for piece in self._free if piece.device == device]
        fitting = [piece for piece in free if piece.memory.numel() >= nbytes]
        if fitting:
            found = min(fitting, key=lambda piece: piece.memory.numel())
            self._free.remove(found)
            return found
        if free:
            copies.finish()
            self._pieces = [piece for piece in self._pieces if piece not in free]
            self._free = [piece for piece in self._free if piece not in free]
        piece = _Piece(torch.empty(nbytes, dtype=torch.uint8), device)
        if device.type == "cuda":
            pin(piece, piece.memory)
        self._pieces.append(piece)
        if self.seen_by is not None:
            self.seen_by(piece.memory)
        return piece

    def _give(self, piece: _Piece) -> None:
        self._free.append(piece)

    def __deepcopy__(self, memo: Any) -> HostInputs:
        return HostInputs()

    def __reduce__(self) -> tuple[Any, ...]:
        return HostInputs, ()


def _padded(tensor: Tensor) -> int:
    """Bytes up to where the next tensor may begin."""
    return -(-tensor.nbytes // 64) * 64


class OnHost:
    """What is kept of one tensor `[..., width]`, on the host.

    Attributes:
        release: gives the host memory back, also when this dies; once it is back, nothing can be read.
    """

    release: Callable[[], Any]

    def __init__(
        self,
        copies: Copies,
        device: torch.device,
        tensors: list[Tensor],
        code: tuple[Codec, Encoded] | None,
        shape: torch.Size,
        first: tuple[int, int],
        before: weakref.ref[OnHost] | None,
    ):
        self._copies, self._device, self._tensors = copies, device, tensors
        self._code = code
        self._shape = shape
        self._first, self._before = first, before
        self._coming: tuple[tuple[int, int], list[Tensor], Encoded | None, Any] | None = None

    def begin(self, rows: tuple[int, int] | None = None) -> None:
        """Start to copy rows to the device: those that are asked for first, if none are named."""
        if not self.release.alive:  # type: ignore[attr-defined]
            return
        rows = rows or self._first
        if self._coming is not None and self._coming[0] == rows:
            return
        sources, part = self._tensors, None
        if self._code is None:
            sources = [self._tensors[0][slice(*rows)]]
        else:
            codec, encoded = self._code
            whole = dataclasses.replace(encoded, tensors=tuple(sources))
            part = codec.part(whole, *rows)
            own = sources[0].untyped_storage().data_ptr()
            if any(source.untyped_storage().data_ptr() != own for source in part.tensors):
                # A codec of several planes puts rows together on the host, where they must have arrived.
                self._copies.finish()
                part = codec.part(whole, *rows)
            sources = list(part.tensors)
        targets = [torch.empty_like(source, device=self._device) for source in sources]
        started = None
        for target, source in zip(targets, sources, strict=True):
            started = self._copies.start(target, source)
            # Nobody may come to read it, when a graph is dropped.
            self._copies.hold(target)
        self._coming = rows, targets, part, started

    def rows(self, start: int, stop: int, following: tuple[int, int] | None = None) -> Tensor:
        """Return rows `[stop - start, width]` on the device.

        Args:
            start: the first row.
            stop: their end.
            following: the rows that are asked for next; `None`: the first ones of the block in front of this one.
        """
        if not self.release.alive:  # type: ignore[attr-defined]
            raise RuntimeError(
                "the input of a block has left the host after its backward pass: differentiate a second time with "
                "retain_graph=True in the first"
            )
        self.begin((start, stop))
        assert self._coming is not None
        _, tensors, part, started = self._coming
        self._coming = None
        if following is not None:
            self.begin(following)
        elif self._before is not None and (before := self._before()) is not None:
            before.begin()
        self._copies.wait(started)
        if self._code is None or part is None:
            return tensors[0]
        return self._code[0].decode(dataclasses.replace(part, tensors=tuple(tensors)))

    def all_rows(self) -> HostRows:
        """Return what stands for the tensor where it is cut."""
        return HostRows(self, self._shape)


class HostRows:
    """Stands for a tensor `[batch, tokens, width]` on the host where chunks and tiles are cut: `[a:b]` and `narrow(1, ...)`.

    Attributes:
        requires_grad: as that of a tensor.
    """

    def __init__(self, kept: OnHost, shape: torch.Size, first: int = 0):
        self._kept, self.shape, self._first = kept, shape, first
        self.requires_grad = False
        self._longest = 0

    def detach(self) -> HostRows:
        """Return the same, as for a tensor."""
        return self

    def requires_grad_(self, requires_grad: bool) -> HostRows:
        """Note whether what is cut shall need a gradient."""
        self.requires_grad = requires_grad
        return self

    def __getitem__(self, samples: slice) -> HostRows:
        start, stop, _ = samples.indices(self.shape[0])
        shape = torch.Size([stop - start, *self.shape[1:]])
        return HostRows(self._kept, shape, self._first + start * self.shape[1:-1].numel())

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """Return tokens of the one sample, the next ones on their way."""
        assert dim == 1
        assert self.shape[0] == 1
        self._longest = max(self._longest, length)
        end = start + length
        following = (end, min(end + self._longest, self.shape[1])) if end < self.shape[1] else None
        first = self._first
        ahead = None if following is None else (first + following[0], first + following[1])
        rows = self._kept.rows(first + start, first + end, ahead)
        return rows.view(1, length, self.shape[-1])

    def whole(self) -> Tensor:
        """Return the tensor."""
        rows = self.shape[:-1].numel()
        return self._kept.rows(self._first, self._first + rows).view(self.shape)
