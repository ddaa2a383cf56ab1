"""Dropout on a CPU by `cpu_dropout.c`, where that compiles: a mask is a function of a seed and a position."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from slimfit_ds import native
from slimfit_ds.activations.codecs.base import is_fake, stands_for_device

__all__ = ["CpuMask", "converts", "drop", "on_cpu", "runs_in_c", "softmax_gradient"]

_SOURCE = Path(__file__).with_name("cpu_dropout.c")
_NAMES = {torch.float32: "f32", torch.bfloat16: "b16", torch.float64: "f64"}
_DROPS = {(dtype, dtype): name for dtype, name in _NAMES.items()} | {
    (torch.float32, torch.bfloat16): "f32_b16"
}
_LEVELS = 1 << 16
# As in the C file: a tile of elements, and the counters that it takes.
_TILE, _COUNTERS = 256, 32


def on_cpu(x: Tensor) -> bool:
    """True for CPU tensors, and for fake ones that stand for those."""
    return x.device.type == "cpu" and not stands_for_device(x)


def runs_in_c(x: Tensor) -> bool:
    """True for CPU tensors of a dtype that the kernels take, where they compile; on fake ones these do nothing."""
    return on_cpu(x) and x.dtype in _NAMES and _library() is not None


def converts(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether `drop` writes `target` from `source`, and `softmax_gradient` takes probabilities and a gradient so."""
    return (source, target) in _DROPS


@cache
def _library() -> ctypes.CDLL | None:
    library = native.load(_SOURCE)
    if library is not None:
        pointer, count, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        mask = [pointer, ctypes.c_uint64, ctypes.c_uint32, real]
        for name in _DROPS.values():
            function = getattr(library, f"drop_{name}")
            function.argtypes, function.restype = [pointer, pointer, count, count, *mask], None
        for name in _NAMES.values():
            function = getattr(library, f"softmax_gradient_{name}")
            function.argtypes, function.restype = [*[pointer] * 3, *[count] * 3, *mask, real], None
    return library


@dataclass(frozen=True)
class CpuMask:
    """A mask as the numbers that it is made from.

    Attributes:
        p: the probability of a zero, taken to the nearest multiple of 2^-16.
        seed: key of the generator (Philox 4x32-10, Salmon et al. 2011), an int64 tensor of one number, which only the
            kernels read.
        first: counter of the first element.
    """

    p: float
    seed: Tensor
    first: int = 0

    @classmethod
    def draw(cls, p: float) -> CpuMask:
        """A new mask, its seed taken from the CPU's generator."""
        return cls(p, torch.empty((), dtype=torch.int64).random_())

    @staticmethod
    def takes(p: float) -> bool:
        """Whether some elements are dropped and some stay, with 16 bits for each."""
        return 0 < round(p * _LEVELS) < _LEVELS

    def apply(self, values: Tensor) -> Tensor:
        """The values that stay, scaled; zero elsewhere."""
        values = values.contiguous()
        out = torch.empty_like(values)
        drop(values, out, self)
        return out

    def after(self, matrices: int, numel: int) -> CpuMask:
        """The mask of what follows that many matrices of `numel` elements."""
        return CpuMask(self.p, self.seed, self.first + matrices * counters_for(numel))

    def numbers(self) -> tuple[int, int, int, float]:
        """What the kernels take: address of the seed, first counter, threshold, and the factor that keeps the mean."""
        threshold = round(self.p * _LEVELS)
        return self.seed.data_ptr(), self.first, threshold, _LEVELS / (_LEVELS - threshold)


def counters_for(numel: int) -> int:
    """How many counters the mask of a matrix of `numel` elements takes."""
    return -(-numel // _TILE) * _COUNTERS


def drop(x: Tensor, y: Tensor, mask: CpuMask, matrices: int = 1) -> None:
    """Fill `y` with what the mask leaves of `x`, scaled, and zeros.

    Args:
        x: [matrices, ...], contiguous; fp32, bf16 or fp64.
        y: as `x`, of the same dtype, or bf16 where `x` is fp32.
        mask: each matrix takes counters of its own.
        matrices: how many.
    """
    if is_fake(x):
        return
    function = getattr(_library(), f"drop_{_DROPS[x.dtype, y.dtype]}")
    function(x.data_ptr(), y.data_ptr(), matrices, x.numel() // matrices, *mask.numbers())


def softmax_gradient(
    p: Tensor, gradient: Tensor, dropped: Tensor | None, mask: CpuMask | None, scale: float
) -> None:
    """The gradient of scores from that of dropped probabilities, in its place, and these probabilities.

    Args:
        p: probabilities [matrices, rows, columns], contiguous; fp64 where `gradient` is, else fp32.
        gradient: of the dropped probabilities, as `p`, fp32, bf16 or fp64; overwritten by `scale * p * (g - sum(p * g))`
            with `g` what the mask leaves of it and sums over columns.
        dropped: filled with what the mask leaves of `p`, in the dtype of `gradient`; `None`: not asked for.
        mask: as `drop` took it for these matrices; `None`: everything stays.
        scale: factor of the scores.
    """
    if is_fake(p):
        return
    numbers = (None, 0, 0, 1.0) if mask is None else mask.numbers()
    function = getattr(_library(), f"softmax_gradient_{_NAMES[gradient.dtype]}")
    target = None if dropped is None else dropped.data_ptr()
    function(p.data_ptr(), gradient.data_ptr(), target, *p.shape, *numbers, scale)
