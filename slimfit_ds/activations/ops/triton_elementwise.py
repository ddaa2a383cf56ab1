"""Activation functions and their derivatives inside Triton kernels, on fp32 values.

A function is written the way PyTorch evaluates it on a device, rounding where PyTorch rounds: a module made of several
operations (transformers' `NewGELUActivation`) rounds each of them to the tensor's dtype. `FORMS` lists, for each name of
`codecs.step_derivative`, the ways it is evaluated in the wild; which of them is a module's own is found by trying.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

from slimfit_ds.activations.codecs.triton_rounding import round_to

__all__ = ["FORMS", "SLOPES"]

# The interpreter has no libdevice; compiled, only libdevice rounds as CUDA's own functions do.
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _exp(x):
    if _INTERPRETED:
        y = tl.exp(x)
    else:
        y = libdevice.exp(x)
    return y


@triton.jit
def _tanh(x):
    if _INTERPRETED:
        # Of the magnitude: the exponential must not overflow.
        shrunk = tl.exp(-2.0 * tl.abs(x))
        y = tl.where(x < 0, -1.0, 1.0) * (1.0 - shrunk) / (1.0 + shrunk)
    else:
        y = libdevice.tanh(x)
    return y


@triton.jit
def _sigmoid(x):
    denominator = 1.0 + _exp(-x)
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), denominator)


@triton.jit
def _as(value, dtype: tl.constexpr):
    """As if it had been stored in `dtype`."""
    return round_to(value, dtype).to(tl.float32)


@triton.jit
def gelu(x, dtype: tl.constexpr):
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x, dtype: tl.constexpr):
    inner = 0.7978845608028654 * tl.fma(x * x * x, tl.full(x.shape, 0.044715, tl.float32), x)
    return 0.5 * x * (1.0 + _tanh(inner))


@triton.jit
def gelu_tanh_unfused(x, dtype: tl.constexpr):
    cube = _as(_as(x * x, dtype) * x, dtype)
    inner = _as(0.7978845608028654 * _as(x + _as(0.044715 * cube, dtype), dtype), dtype)
    return _as(0.5 * x, dtype) * _as(1.0 + _as(_tanh(inner), dtype), dtype)


@triton.jit
def silu(x, dtype: tl.constexpr):
    return tl.div_rn(x, 1.0 + _exp(-x))


@triton.jit
def quick_gelu_unfused(x, dtype: tl.constexpr):
    return x * _as(_sigmoid(_as(1.702 * x, dtype)), dtype)


@triton.jit
def relu(x, dtype: tl.constexpr):
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * _exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def _gelu_tanh_slope(x):
    square = x * x
    tanh = _tanh(0.7978845608028654 * x * (1.0 + 0.044715 * square))
    # Where tanh is 1 the square of x may be infinite.
    rest = 1.0 - tanh * tanh
    bend = 0.5 * x * rest * 0.7978845608028654 * (1.0 + 0.134145 * square)
    return 0.5 * (1.0 + tanh) + tl.where(rest > 0.0, bend, 0.0)


@triton.jit
def _silu_slope(x):
    gate = _sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def _quick_gelu_slope(x):
    gate = _sigmoid(1.702 * x)
    return gate * (1.0 + 1.702 * x * (1.0 - gate))


@triton.jit
def _relu_slope(x):
    return tl.where(x > 0.0, 1.0, 0.0)


FORMS = {
    "gelu": (gelu,),
    "gelu_tanh": (gelu_tanh, gelu_tanh_unfused),
    "silu": (silu,),
    "quick_gelu": (quick_gelu_unfused,),
    "relu": (relu,),
}
"""Name -> functions of fp32 values and the tensor's dtype; the last rounding is the caller's."""

SLOPES = {
    "gelu": _gelu_slope,
    "gelu_tanh": _gelu_tanh_slope,
    "silu": _silu_slope,
    "quick_gelu": _quick_gelu_slope,
    "relu": _relu_slope,
}
"""Name -> the derivative on fp32 values."""
