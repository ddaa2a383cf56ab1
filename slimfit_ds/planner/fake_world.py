"""A pretended world: fake tensors, a fake process group of any size, no byte of weights allocated.

Inside `FakeWorld` the real training code runs, DeepSpeed's optimizers included, and every tensor has shape, dtype
and storage size but no data. What the code reads back from tensors (a norm, an overflow flag) is answered with
harmless constants: such values steer numbers, not allocations.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import masking_utils

from slimfit_ds.activations.ops import cross_entropy
from slimfit_ds.activations.tiles import TilePass
from slimfit_ds.optim import low_bit
from slimfit_ds.planner.speed import ProductCounter

__all__ = ["CudaSemantics", "FakeWorld"]

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


def _stay(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """Return the module as it is: `nn.Module._apply`, whose signature the check of private names compares."""
    return self


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
                "use `slimfit_ds.estimate`, which starts one"
            )
        saved = {name: os.environ.get(name) for name in [*_ENVIRONMENT, "WORLD_SIZE"]}
        os.environ.update(_ENVIRONMENT, WORLD_SIZE=str(self.world_size))
        self._stack.callback(_restore, saved)
        if not dist.is_initialized():
            # Never destroyed: DeepSpeed keeps the groups of its first engine for the life of the process.
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.world_size)
        apply = nn.Module._apply
        nn.Module._apply = _stay  # type: ignore[method-assign]
        self._stack.callback(setattr, nn.Module, "_apply", apply)
        # Asked of fake positions, transformers cannot say that nothing is packed, and makes a mask [tokens, tokens].
        packed = masking_utils.find_packed_sequence_indices
        self._stack.callback(setattr, masking_utils, "find_packed_sequence_indices", packed)
        masking_utils.find_packed_sequence_indices = lambda *_, **__: None
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


_FP32_UNDER_AUTOCAST = (
    (F, "layer_norm"),
    (F, "softmax"),
    (F, "log_softmax"),
    (F, "cross_entropy"),
    (torch, "softmax"),
)


class _FusedAttention(torch.autograd.Function):
    """The saved tensors of the flash and memory-efficient kernels: q, k, v, mask, output, log-sum-exp.

    Their products count: two of the forward pass, five of the backward pass, half of each where it is causal.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
    ) -> torch.Tensor:
        ctx.product = 2 * q.numel() * k.shape[-2] * (0.5 if causal else 1.0)
        ProductCounter.add(2 * ctx.product)
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(q.dtype)  # the kernel wants an additive mask: a copy for every layer
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, *([] if mask is None else [mask]))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        q, k, v = ctx.saved_tensors[:3]
        ProductCounter.add(5 * ctx.product)
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


_Part = TypeVar("_Part")


def _few(parts: Sequence[_Part]) -> Iterator[_Part]:
    """Of parts that are all alike the first two and the last, the second counted for the rest."""
    yield parts[0]
    if len(parts) > 2:
        with ProductCounter.times(len(parts) - 2):
            yield parts[1]
    if len(parts) > 1:
        yield parts[-1]


def _few_tiles(self: TilePass) -> Iterator[tuple[int, tuple[int, int]]]:
    """Take the place of `TilePass.each`."""
    return _few(list(enumerate(self.bounds)))


def _few_chunks(tokens: int, chunk_tokens: int) -> Iterator[int]:
    """Take the place of `cross_entropy._starts`."""
    return _few(range(0, tokens, chunk_tokens))


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Take the place of `low_bit.nearest`, whose peak is the rounding at the end: seven of eight halvings are left out."""
    codes = torch.where(values >= levels[128], 128, 0)
    above = (codes + 1).clip(max=255)
    low, high = levels[codes], levels[above]
    residual = values - low
    return torch.where(residual >= (high - low) * 0.5, above, codes).to(torch.uint8)


class CudaSemantics:
    """While open, attention, dropout and autocast keep for backward what they keep on CUDA. For fake tensors only.

    Three things differ: CUDA has fused attention for dropout and for every mask, where the CPU falls back to kept
    probabilities; dropout keeps a mask of bytes; and CUDA's autocast runs norms and softmax in fp32.

    Functions are replaced where they are looked up: a torch function mode would not reach the recomputation of a
    checkpoint, which runs inside the backward pass. What takes the same many times is run less often: three tiles of a
    sequence, three chunks of a loss, and one halving of torchao's search for the nearest level.

    Args:
        autocast: whether the step runs under autocast, so that norms and softmax take fp32 inputs.
    """

    def __init__(self, autocast: bool = False):
        self._autocast = autocast
        self._stack = ExitStack()

    def __enter__(self) -> CudaSemantics:
        self._replace(F, "scaled_dot_product_attention", self._attention)
        self._replace(F, "dropout", _dropout)
        self._replace(TilePass, "each", _few_tiles)
        self._replace(cross_entropy, "_starts", _few_chunks)
        self._replace(low_bit, "nearest", _nearest)
        if self._autocast:
            for owner, name in _FP32_UNDER_AUTOCAST:
                self._replace(owner, name, _in_fp32(getattr(owner, name)))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _replace(self, owner: Any, name: str, function: Any) -> None:
        self._stack.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, function)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        dtype = torch.bfloat16 if self._autocast else query.dtype
        return _FusedAttention.apply(query.to(dtype), key.to(dtype), value.to(dtype), attn_mask, is_causal)


def _dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """CUDA keeps a mask of one byte per element; the CPU keeps one in the dtype of the input."""
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


def _in_fp32(function: Any) -> Any:
    @functools.wraps(function)
    def run(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return function(input.float(), *args, **kwargs)

    return run
