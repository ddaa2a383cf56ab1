"""What autograd keeps for the backward pass, counted: dynamic and static activations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["DYNAMIC", "STATIC", "SavedActivations", "StorageLedger", "plain_tensors"]

DYNAMIC = "saved_activations_dynamic"
STATIC = "saved_activations_static"


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


class SavedActivations:
    """Counts the bytes that autograd saves while the context is open; the tensors pass unchanged.

    Dynamic is what an active linear, convolution or embedding keeps for its own weight gradient: a frozen layer
    does not keep it. Static is everything else (norm inputs, activation inputs, attention operands, masks).
    Sizes are those of whole storages, each counted once; a storage that serves both is static, because freezing
    would not free it. Parameters, buffers and their views are not activations and are skipped.

    Works on CPU, CUDA and fake tensors. It sees what passes through autograd's saved-tensor hooks: inside
    `torch.utils.checkpoint` nothing is saved, and tensors that a custom function hangs on `ctx` by attribute are
    not seen; `MemoryTracker` counts those too.

    Example:
        with SavedActivations(model) as saved:
            loss = model(**batch).loss
        saved.dynamic, saved.static  # bytes
    """

    def __init__(self, model: nn.Module, on_save: Callable[[torch.Tensor, str], None] | None = None):
        """
        Args:
            model: the module whose parameters and buffers do not count.
            on_save: called with every counted tensor and its kind (`DYNAMIC` or `STATIC`).
        """
        self._model = model
        self._on_save = on_save
        self._stack: list[nn.Module] = []
        self._handles: list[Any] = []
        self._ledger = StorageLedger(self._note_peak)
        self._peak: dict[str, int] = {DYNAMIC: 0, STATIC: 0}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def dynamic(self) -> int:
        """Bytes of dynamic activations when most was saved."""
        return self._peak[DYNAMIC]

    @property
    def static(self) -> int:
        """Bytes of static activations when most was saved."""
        return self._peak[STATIC]

    @property
    def total(self) -> int:
        """Bytes saved for backward when most was saved."""
        return self.dynamic + self.static

    def live(self) -> dict[str, int]:
        """Bytes by kind that are still alive now."""
        return {kind: self._ledger.live.get(kind, 0) for kind in (DYNAMIC, STATIC)}

    def __enter__(self) -> SavedActivations:
        self._skip = {
            storage_key(plain)
            for tensor in [*self._model.parameters(), *self._model.buffers()]
            for plain in plain_tensors(tensor)
            if plain.untyped_storage().nbytes()
        }
        self._handles = [
            register_module_forward_pre_hook(lambda module, _: self._stack.append(module)),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles, self._stack = [], []

    def _leave(self, module: nn.Module, *_: object) -> None:
        # An exception in a pre-hook can leave a module on the stack without its exit being called.
        while self._stack and self._stack.pop() is not module:
            pass

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        # What a checkpoint saves while it recomputes lives within the backward pass: that is working memory.
        if torch._C._current_graph_task_id() == -1 and not self._is_weight(tensor):
            kind = DYNAMIC if self._in_active_weight_layer() else STATIC
            for plain in plain_tensors(tensor):
                self._ledger.put(plain, kind, only_from=frozenset({DYNAMIC}))
            if self._on_save is not None:
                self._on_save(tensor, kind)
        return tensor

    def _is_weight(self, tensor: torch.Tensor) -> bool:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return True
        key = storage_key(next(plain_tensors(tensor), tensor))
        # ZeRO 3 gives a parameter its storage only while its module runs, so the set made on entry is not enough.
        own = self._stack[-1].parameters(recurse=False) if self._stack else ()
        return key in self._skip or any(storage_key(plain) == key for p in own for plain in plain_tensors(p))

    def _in_active_weight_layer(self) -> bool:
        """Whether the innermost running module is a leaf with a trainable weight of two or more dimensions."""
        if not self._stack or next(self._stack[-1].children(), None) is not None:
            return False
        return any(
            p.requires_grad and len(getattr(p, "ds_shape", p.shape)) > 1
            for p in self._stack[-1].parameters(recurse=False)
        )

    def _note_peak(self) -> None:
        if self._ledger.total > sum(self._peak.values()):
            self._peak = self.live()
