"""What memory is used in a training step: every live storage, by kind, and where the peak stood."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from slimfit_ds.memory.saved import (
    DYNAMIC,
    STATIC,
    SavedActivations,
    StorageLedger,
    plain_tensors,
    storage_key,
)

__all__ = [
    "HOST",
    "HOST_ACTIVATIONS",
    "HOST_WEIGHTS",
    "KINDS",
    "MemoryReport",
    "MemoryTracker",
    "Peak",
    "Roots",
    "optimizer_tensors",
    "training_device",
]

HOST = "optimizer_host"
HOST_WEIGHTS = "parameters_host"
HOST_ACTIVATIONS = "saved_activations_host"
_HOST_KINDS = (HOST, HOST_WEIGHTS, HOST_ACTIVATIONS)
KINDS = (
    "parameters",
    "gradients",
    "optimizer",
    "saved_activations_dynamic",
    "saved_activations_static",
    "communication",
    "working",
)
"""Kinds of bytes on the training device; `optimizer_host`, `parameters_host` and `saved_activations_host` are counted beside them."""
_WORKING = frozenset({"working"})

Roots = Mapping[str, Callable[[], Iterable[torch.Tensor]]]
"""Kind -> a function that returns the tensors that are of this kind now."""


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of one training step on one rank.

    `parameters` to `working` are what was held at most at any time, each by itself; `at_peak` is what was
    held, by kind, at the moment when the sum over the device was largest.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    optimizer_host: int = 0
    parameters_host: int = 0
    saved_activations_host: int = 0
    saved_activations_dynamic: int = 0
    saved_activations_static: int = 0
    communication: int = 0
    working: int = 0
    peak: int = 0
    peak_phase: str = ""
    peak_module: str = ""
    at_peak: dict[str, int] = field(default_factory=dict)
    host_rss: int = 0
    cuda_peak_allocated: int | None = None
    cuda_peak_reserved: int | None = None

    @property
    def saved_activations(self) -> int:
        """Bytes kept for backward, dynamic and static."""
        return self.saved_activations_dynamic + self.saved_activations_static

    @property
    def host(self) -> int:
        """Bytes of weights, optimizer states and inputs of blocks on the host."""
        return self.optimizer_host + self.parameters_host + self.saved_activations_host

    @property
    def model_states(self) -> int:
        """Bytes of weights, gradients and optimizer states on the device."""
        return self.parameters + self.gradients + self.optimizer

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Peak:
    """The largest total on the device while a module ran in a phase, and what it was made of."""

    total: int
    live: dict[str, int]
    phase: str
    module: str


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Every tensor in the state of `optimizer`, at any depth."""
    return (leaf for leaf in tree_iter(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor))


class MemoryTracker(TorchDispatchMode):
    """Tracks every storage that is made while the mode is active, on CPU, CUDA or fake tensors.

    Kinds are found out as follows: parameters and buffers belong to the model; a gradient is what `param.grad`
    holds; a saved activation is what passes autograd's saved-tensor hooks, and whatever else the forward pass
    made that is still alive when it ends (a custom function may keep tensors on `ctx`); a communication buffer is
    what a collective was given; optimizer states and host tensors come from `roots`. The rest is the working set.
    Memory that a kernel allocates inside itself is not seen; on CUDA the report carries torch's own statistics.

    Example:
        with MemoryTracker(model, {"optimizer": lambda: optimizer_tensors(optimizer)}) as tracker:
            loss = model(**batch).loss
            loss.backward()
            with tracker.phase("step"):
                optimizer.step()
        tracker.report().peak  # bytes
    """

    def __init__(
        self,
        model: nn.Module,
        roots: Roots | None = None,
        device: torch.device | str | None = None,
        timeline: bool = False,
        snapshot: str | Path | None = None,
    ):
        """
        Args:
            model: the module that is trained.
            roots: further kinds, `optimizer`, `optimizer_host` or `communication`, asked for at phase changes.
            device: the training device; tensors elsewhere count as host memory. Default: that of the parameters.
            timeline: keep `(phase, module, bytes by kind)` at every change, for the picture.
            snapshot: file for torch's own memory snapshot of the tracked time (CUDA only), for pytorch.org/memory_viz.

        Raises:
            ValueError: an unknown kind of root, or a snapshot without a CUDA device.
        """
        super().__init__()
        self._model = model
        self._roots = dict(roots or {})
        unknown = sorted(set(self._roots) - set(KINDS) - {HOST})
        if unknown:
            raise ValueError(f"roots must be of the kinds {[*KINDS, HOST]}, got {unknown}")
        self._device = torch.device(device or training_device(model)).type
        if snapshot is not None and self._device != "cuda":
            raise ValueError(
                f"snapshot: torch's allocator records them on CUDA only, the model is on {self._device}"
            )
        self._snapshot = snapshot
        self._ledger = StorageLedger(self._note)
        self._path = _ModulePath(model)
        self._saved = SavedActivations(model, on_save=self._on_save)
        self._phase: str | None = None
        self._on_host: dict[int, str] = {}
        self._highest: dict[str, int] = {}
        self._peaks: dict[tuple[str, str], Peak] = {}
        self._was_forward = False
        self.timeline: list[tuple[str, str, dict[str, int]]] | None = [] if timeline else None

    def __enter__(self) -> MemoryTracker:
        self._find_streamed()
        for tensor in [*self._model.parameters(), *self._model.buffers()]:
            self._put(tensor, "parameters")
        self._grad_handles = [
            p.register_post_accumulate_grad_hook(self._on_gradient)
            for p in self._model.parameters()
            if p.requires_grad
        ]
        self.sync()
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if self._snapshot is not None:
            torch.cuda.memory._record_memory_history()
        self._path.__enter__()
        self._saved.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(self._snapshot))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._saved.__exit__(*error)
        self._path.__exit__(*error)
        for handle in self._grad_handles:
            handle.remove()
        self.sync()
        for module in self._model.modules():
            if (inputs := module.__dict__.get("slimfit_host_inputs")) is not None:
                inputs.seen_by = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what is done inside (`step`); forward and backward are found out by themselves."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self.sync()
            self._phase = before

    def _find_streamed(self) -> None:
        """Learn which memory of a CPU stands for the host's: that of frozen weights that take turns in buffers, and of inputs of
        blocks."""
        self._on_host = {}
        for module in self._model.modules():
            streaming = module.__dict__.get("slimfit_streaming")
            if streaming is not None:
                self._on_host |= {storage_key(tensor): HOST_WEIGHTS for tensor in streaming.host_tensors}
                for tensor in streaming.device_tensors:
                    self._put(tensor, "parameters")
            inputs = module.__dict__.get("slimfit_host_inputs")
            if inputs is not None:
                inputs.seen_by = self._on_host_memory
                for tensor in inputs.host_tensors:
                    self._on_host_memory(tensor)

    def _on_host_memory(self, tensor: torch.Tensor) -> None:
        """Count memory for inputs of blocks as the host's."""
        self._on_host[storage_key(tensor)] = HOST_ACTIVATIONS
        self._put(tensor, HOST_ACTIVATIONS)

    def sync(self) -> None:
        """Ask the model and the roots again which tensors are theirs."""
        self._find_streamed()
        for parameter in self._model.parameters():
            self._put(parameter, "parameters")
            self._on_gradient(parameter)
        for kind, tensors in self._roots.items():
            for tensor in tensors():
                self._put(tensor, kind)

    def peaks(self, without_phases: Sequence[str] = ()) -> list[Peak]:
        """The largest totals seen so far, one for each phase and module, without these phases."""
        return [peak for (phase, _), peak in self._peaks.items() if phase not in without_phases]

    def report(self, without_phases: Sequence[str] = ()) -> MemoryReport:
        """The bytes seen so far.

        Args:
            without_phases: phases whose peak does not count (those that work in host memory).
        """
        cuda = self._device == "cuda"
        peak = max(self.peaks(without_phases), key=lambda p: p.total, default=Peak(0, {}, "", ""))
        return MemoryReport(
            **{kind: self._highest.get(kind, 0) for kind in (*KINDS, *_HOST_KINDS)},
            peak=peak.total,
            peak_phase=peak.phase,
            peak_module=peak.module,
            at_peak=peak.live,
            host_rss=psutil.Process().memory_info().rss,
            cuda_peak_allocated=torch.cuda.max_memory_allocated() if cuda else None,
            cuda_peak_reserved=torch.cuda.max_memory_reserved() if cuda else None,
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        phase = self._current_phase()
        if phase == "forward":
            self._was_forward = True
        elif self._was_forward and phase == "backward":
            self._was_forward = False
            # What outlives the forward pass is kept for backward, whether or not a hook has seen it.
            self._ledger.move_all("working", STATIC)
        result = func(*args, **(kwargs or {}))
        kind = "communication" if func.namespace == "c10d" else "working"
        for leaf in tree_iter((args, result) if kind == "communication" else result):
            if isinstance(leaf, torch.Tensor):
                self._put(leaf, kind, _WORKING)
        return result

    def _put(self, tensor: torch.Tensor, kind: str, only_from: frozenset[str] | None = None) -> None:
        for plain in plain_tensors(tensor):
            if (where := self._on_host.get(storage_key(plain))) is not None:
                self._ledger.put(plain, where)
                continue
            # A fake tensor's `device` is an operation of its own.
            device = (getattr(plain, "fake_device", None) or plain.device).type
            if device not in (self._device, "meta"):
                self._ledger.put(plain, HOST_WEIGHTS if kind == "parameters" else HOST)
            elif device == self._device and plain.untyped_storage().nbytes():
                self._ledger.put(plain, kind, only_from)

    def _on_save(self, tensor: torch.Tensor, kind: str) -> None:
        self._put(tensor, kind, _WORKING | {DYNAMIC})

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and gradient.layout == torch.strided:
            # ZeRO 2 and 3 make gradients views of a bucket; the bucket is there to be sent.
            own = gradient.untyped_storage().nbytes() <= gradient.numel() * gradient.element_size()
            self._put(gradient, "gradients" if own else "communication", _WORKING)

    def _current_phase(self) -> str:
        if self._phase is not None:
            return self._phase
        # A checkpoint's recomputation runs modules inside the backward pass, so this is asked first.
        if torch._C._current_graph_task_id() != -1:
            return "backward"
        return "forward" if self._path.in_forward else "other"

    def _where(self) -> tuple[str, str]:
        phase = self._current_phase()
        return phase, self._path.current if phase in ("forward", "backward") else ""

    def _note(self) -> None:
        live = self._ledger.live
        for kind, size in live.items():
            if size > self._highest.get(kind, 0):
                self._highest[kind] = size
        device_total = self._ledger.total - sum(live.get(kind, 0) for kind in _HOST_KINDS)
        phase, module = self._where()
        highest = self._peaks.get((phase, module))
        if highest is None or device_total > highest.total:
            held = {kind: size for kind, size in live.items() if size and kind not in _HOST_KINDS}
            self._peaks[phase, module] = Peak(device_total, held, phase, module)
        if self.timeline is not None:
            self.timeline.append((phase, module, dict(live)))


def training_device(model: nn.Module) -> torch.device:
    """Return where a model computes: its first parameter may be one whose data lives on the host."""
    streamed = (module.__dict__.get("slimfit_streaming") for module in model.modules())
    found = next((each.device for each in streamed if each is not None), None)
    return found or next(model.parameters()).device


class _ModulePath:
    """Follows the modules of a model while the context is open.

    In the backward pass the current module is the one whose output gradient arrived last.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._handles: list[Any] = []
        self._stack: list[str] = []
        self._backward = ""

    @property
    def in_forward(self) -> bool:
        """Whether a module's forward is running (also one that is recomputed in backward)."""
        return bool(self._stack)

    @property
    def current(self) -> str:
        """The dotted path of the innermost running module; empty outside and for the model itself."""
        return self._stack[-1] if self._stack else self._backward

    def __enter__(self) -> _ModulePath:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leave(name), always_call=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._stack, self._backward = [], [], ""

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            if not self._stack and torch._C._current_graph_task_id() == -1:
                self._backward = ""
            self._stack.append(name)

        return hook

    def _leave(self, name: str) -> Any:
        def arrived(gradient: torch.Tensor) -> None:
            self._backward = name

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            while self._stack and self._stack.pop() != name:
                pass
            for leaf in tree_iter(output):
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(arrived)

        return hook
