"""Storages: the unit in which memory is held, whatever number of tensors look at it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["StorageLedger", "plain_tensors", "storage_key", "tensor_bytes"]


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the bytes of `tensor`: itself, or the inner ones of a wrapper subclass (8-bit states)."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor


def storage_key(tensor: torch.Tensor) -> int:
    """An identity of the tensor's storage that is valid while the storage lives."""
    return tensor.untyped_storage()._cdata


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes that `tensors` hold together: whole storages, each counted once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            sizes[storage_key(plain)] = plain.untyped_storage().nbytes()
    return sum(sizes.values())


class StorageLedger:
    """Live bytes by kind, kept right by weak references: a storage leaves the ledger when it is freed."""

    def __init__(self, on_change: Callable[[], None] | None = None):
        """
        Args:
            on_change: called after bytes were added or moved to another kind (never when they were freed).
        """
        self.live: dict[str, int] = {}
        self.total = 0
        self._on_change = on_change
        self._entries: dict[int, list] = {}  # key -> [weak reference, bytes, kind]

    def kind(self, tensor: torch.Tensor) -> str | None:
        """The kind under which the tensor's storage is booked; None when it is not."""
        entry = self._entries.get(storage_key(tensor))
        return None if entry is None else entry[2]

    def put(self, tensor: torch.Tensor, kind: str, only_from: frozenset[str] | None = None) -> None:
        """Book the storage of `tensor` under `kind`, or move it there.

        Args:
            only_from: move a storage that is booked already only if its kind is one of these.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        entry = self._entries.get(key)
        if entry is None:
            reference = weakref.ref(storage, partial(self._forget, key))
            self._entries[key] = [reference, size, kind]
            self._book(kind, size)
        elif entry[2] != kind or entry[1] != size:
            new_kind = kind if only_from is None or entry[2] in only_from else entry[2]
            if new_kind == entry[2] and entry[1] == size:
                return
            self._book(entry[2], -entry[1])
            entry[1], entry[2] = size, new_kind  # a storage can be resized in place (ZeRO 3 does)
            self._book(new_kind, size)
        else:
            return
        if self._on_change is not None:
            self._on_change()

    def move_all(self, source: str, target: str) -> None:
        """Move every live storage of kind `source` to kind `target`."""
        for entry in self._entries.values():
            if entry[2] == source:
                entry[2] = target
        self._book(target, self.live.pop(source, 0), moved=True)

    def _book(self, kind: str, size: int, moved: bool = False) -> None:
        self.live[kind] = self.live.get(kind, 0) + size
        self.total += 0 if moved else size

    def _forget(self, key: int, _: object) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._book(entry[2], -entry[1])
