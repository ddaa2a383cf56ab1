"""Gradients of the active parameters only, averaged over the ranks of a DistributedDataParallel run.

DDP fixes its buckets when it is made: toggled `requires_grad` is either an error (a bucket waits for a gradient that
never comes) or, with `find_unused_parameters`, sends zeros for every frozen weight and holds a second copy of all
gradients. Here DDP is told to leave the parameters alone, and one packed all-reduce at the end of the backward pass
sends what is active.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from slimfit_ds.optim.transfer import to_device

__all__ = ["ActiveGradients", "hide_from_ddp", "show_to_ddp"]

_IGNORED = "_ddp_params_and_buffers_to_ignore"

_PACKED_BYTES = 32 * 2**20
"""A gradient larger than this is sent where it lies; smaller ones are packed into messages of this size."""


def hide_from_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Let a DDP wrapper made later neither reduce these parameters nor hold buckets for them.

    The smallest one stays, because DDP refuses a model without any.
    """
    parameters = dict(model.named_parameters())
    ranked = sorted(names, key=lambda name: parameters[name].numel())
    setattr(model, _IGNORED, [*getattr(model, _IGNORED, ()), *ranked[1:]])


def show_to_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Undo `hide_from_ddp` for wrappers made from now on; what others have hidden stays so."""
    others = set(getattr(model, _IGNORED, ())) - set(names)
    if others:
        setattr(model, _IGNORED, sorted(others))
    elif hasattr(model, _IGNORED):
        delattr(model, _IGNORED)


class ActiveGradients:
    """Averages the gradients of whatever trains in a step.

    Args:
        model: inside of the wrapper, or without one.
        parameters: all that may train, by name, in the same order on every rank.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]):
        self._model = model
        self._names = list(parameters)
        self._parameters = list(parameters.values())
        self._world = dist.get_world_size()
        self._queued = False
        self._live = True
        self._reduced = False
        self.bytes_sent = 0
        # DDP no longer does it for parameters that it must leave alone; a split layer's frozen weight is one of them.
        everyone = dict(model.named_parameters())
        hidden = {name: everyone[name] for name in getattr(model, _IGNORED, ()) if name in everyone}
        for parameter in {**hidden, **parameters}.values():
            dist.broadcast(parameter.data, src=0)
        self._hooks: list[Any] = [
            model.register_forward_hook(self._watch_output),
            register_module_forward_pre_hook(self._find_wrapper),
        ]

    def remove(self) -> None:
        """Stop; a wrapper that was told to stay quiet says so if somebody trains with it."""
        self._live = False
        for hook in self._hooks:
            hook.remove()

    def average(self, sums: Tensor) -> Tensor:
        """The mean over the ranks, the same bits on all of them."""
        dist.all_reduce(sums)
        return sums / self._world

    def take_reduction(self) -> bool:
        """Whether gradients were averaged since the last call."""
        done, self._reduced = self._reduced, False
        return done

    def _find_wrapper(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, DistributedDataParallel) and module.module is self._model:
            # A hook on every module of the process costs time: it goes once it has found what it looks for.
            self._hooks.pop().remove()
            module.register_forward_pre_hook(self._quiet)
            self._quiet(module, args)

    def _quiet(self, wrapper: Any, args: Any) -> None:
        """Before each forward pass of DDP: it has nothing to reduce and no unused parameters to look for."""
        if not self._live:
            if wrapper.training and torch.is_grad_enabled():
                raise RuntimeError(
                    "this DistributedDataParallel wrapper leaves gradients to SlimFitCallback, which is gone: "
                    "wrap the model anew (make a new Trainer) to train without the callback"
                )
            return
        wrapper.require_backward_grad_sync = False
        wrapper.find_unused_parameters = False
        # Buffers are sent from the first rank as before.
        wrapper.require_forward_param_sync = True

    def _watch_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._backward_began)

    def _backward_began(self, gradient: Tensor) -> None:
        from accelerate.state import GradientState

        if not self._queued and GradientState().sync_gradients:
            self._queued = True
            # What DDP itself uses to act at the end of a backward pass; there is no public way.
            torch.autograd.Variable._execution_engine.queue_callback(self._reduce)

    @torch.no_grad()
    def _reduce(self) -> None:
        self._queued = False
        present = self._compare()
        for bucket in _buckets(present):
            self._send(bucket)
        self._reduced = True

    def _compare(self) -> list[nn.Parameter]:
        """Check that all ranks train the same layers, before anything of them is sent.

        Returns:
            the parameters with a gradient on any rank, all of them now with one.

        Raises:
            RuntimeError: on every rank, naming the layers.
        """
        flags = [float(p.requires_grad) for p in self._parameters]
        flags += [float(p.grad is not None) for p in self._parameters]
        message = to_device(torch.tensor(flags), self._parameters[0].device)
        dist.all_reduce(message)
        trains, has_gradient = message.view(2, -1).tolist()
        differing = [
            f"{name} ({count:.0f} of {self._world} ranks)"
            for name, count in zip(self._names, trains, strict=True)
            if 0 < count < self._world
        ]
        if differing:
            raise RuntimeError(
                f"ranks train different layers: {', '.join(differing)}; give all ranks the same SlimFitCallback "
                "and resume them from one checkpoint"
            )
        present = [p for p, count in zip(self._parameters, has_gradient, strict=True) if count]
        for parameter in present:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return present

    def _send(self, bucket: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in bucket if p.grad is not None]
        if len(gradients) == 1 and gradients[0].is_contiguous():
            flat = gradients[0].view(-1)
        else:
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        # Before the sum, so that 16-bit sums over many ranks do not overflow.
        flat.div_(self._world)
        dist.all_reduce(flat)
        self.bytes_sent += flat.numel() * flat.element_size()
        start = 0
        for gradient in gradients:
            part = flat[start : start + gradient.numel()]
            if part.data_ptr() != gradient.data_ptr():
                gradient.copy_(part.view_as(gradient))
            start += gradient.numel()


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype whose gradients travel in one message, in order."""
    open_: dict[torch.dtype, list[nn.Parameter]] = {}
    sizes: dict[torch.dtype, int] = {}
    for parameter in parameters:
        size = parameter.numel() * parameter.element_size()
        if size > _PACKED_BYTES:
            yield [parameter]
            continue
        if sizes.get(parameter.dtype, 0) + size > _PACKED_BYTES:
            yield open_.pop(parameter.dtype)
            sizes[parameter.dtype] = 0
        open_.setdefault(parameter.dtype, []).append(parameter)
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + size
    yield from open_.values()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in what a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
