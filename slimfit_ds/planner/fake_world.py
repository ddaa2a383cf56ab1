"""A pretended world: fake tensors, a fake process group of any size, no byte of weights allocated.

Inside `FakeWorld` the real training code runs, DeepSpeed's optimizers included, and every tensor has shape, dtype
and storage size but no data. What the code reads back from tensors (a norm, an overflow flag) is answered with
harmless constants: such values steer numbers, not allocations.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["FakeWorld"]

_ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29599",
    # A CPU-only torch cannot run a backward pass on fake CUDA tensors (no device guard).
    "DS_ACCELERATOR": "cpu",
}


class _Constants(TorchDispatchMode):
    """Answers reads of tensor values, which fake tensors do not have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func is aten.equal.default:
            return True
        if func is torch.ops.c10d.broadcast_.default:
            # This is rank 0, from which everything is broadcast: its own known values stay.
            tensors = [t for t in tree_iter(args) if isinstance(t, FakeTensor)]
            constants = [t.constant for t in tensors]
            result = func(*args, **(kwargs or {}))
            for tensor, constant in zip(tensors, constants, strict=True):
                tensor.constant = constant
            return result
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _scalar(tensor: torch.Tensor) -> bool | int | float:
        constant = getattr(tensor, "constant", None)
        if constant is not None:
            return constant.item()
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.is_floating_point() else 0


class FakeWorld:
    """Rank 0 of `world_size` pretended ranks, on fake CPU tensors, while the context is open.

    Modules must be made in their final dtype: `module.to(...)` does nothing inside, because torch refuses to
    exchange the data of fake parameters.

    A process has one world size for its whole life.

    Args:
        world_size: number of pretended ranks.

    Raises:
        RuntimeError: this process already belongs to another process group.
    """

    def __init__(self, world_size: int = 1):
        self.world_size = world_size
        self._stack = ExitStack()

    def __enter__(self) -> FakeWorld:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized() and (
            dist.get_backend() != "fake" or dist.get_world_size() != self.world_size
        ):
            raise RuntimeError(
                f"a fake world of {self.world_size} ranks needs a process without another process group: "
                "use `slimfit_ds.planner.estimator.estimate`, which starts one"
            )
        saved = {name: os.environ.get(name) for name in [*_ENVIRONMENT, "WORLD_SIZE"]}
        os.environ.update(_ENVIRONMENT, WORLD_SIZE=str(self.world_size))
        self._stack.callback(_restore, saved)
        if not dist.is_initialized():
            # Never destroyed: DeepSpeed keeps the groups of its first engine for the life of the process.
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.world_size)
        apply = nn.Module._apply
        nn.Module._apply = lambda module, fn, recurse=True: module  # type: ignore[method-assign]
        self._stack.callback(setattr, nn.Module, "_apply", apply)
        # Rotary tables and the like are made of real tensors at construction.
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        self._stack.enter_context(_Constants())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _restore(saved: dict[str, str | None]) -> None:
    for name, value in saved.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
