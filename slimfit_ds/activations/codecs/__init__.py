"""Codecs: pure functions from a tensor to fewer bytes and back, found by name.

    codec = get_codec("int8", group=64)
    kept = codec.encode(x)          # kept.nbytes == codec.nbytes(x.shape, x.dtype)
    y = codec.decode(kept)          # shape and dtype of x

docs/codecs.md lists each codec's bytes and measured error.
"""

from __future__ import annotations

from functools import partial

from slimfit_ds.activations.codecs.absmax import INT2, INT4, INT5, INT6, INT8, UINT8, AbsmaxCodec
from slimfit_ds.activations.codecs.base import Codec, Encoded
from slimfit_ds.activations.codecs.codebook import NormalCodebook
from slimfit_ds.activations.codecs.crs import ColumnRowSampling
from slimfit_ds.activations.codecs.exact import BitMask, Exact
from slimfit_ds.activations.codecs.fixed_point import FixedPoint
from slimfit_ds.activations.codecs.pruning import TopK
from slimfit_ds.activations.codecs.registry import codec_names, get_codec, register_codec
from slimfit_ds.activations.codecs.step_derivative import StepDerivative

__all__ = ["Codec", "Encoded", "StepDerivative", "codec_names", "get_codec", "register_codec"]

register_codec("exact", Exact)
register_codec("mask", BitMask)
register_codec("int8", partial(AbsmaxCodec, "int8", INT8, group=64))
register_codec("uint8", partial(AbsmaxCodec, "uint8", UINT8, group=64))
register_codec("int6", partial(AbsmaxCodec, "int6", INT6, group=64))
register_codec("int5", partial(AbsmaxCodec, "int5", INT5, group=64))
register_codec("int4", partial(AbsmaxCodec, "int4", INT4, group=32))
# Nearest rounding at 2 bits is biased enough to show in gradients summed over steps; at 4 bits and more it is not.
register_codec("int2", partial(AbsmaxCodec, "int2", INT2, group=32, rounding="stochastic"))
register_codec("lm4", partial(NormalCodebook, "lm4", 4))
register_codec("lm2", partial(NormalCodebook, "lm2", 2))
register_codec("lm1", partial(NormalCodebook, "lm1", 1))
register_codec("step5", partial(StepDerivative, bits=5))
register_codec("step4", partial(StepDerivative, bits=4))
register_codec("step2", partial(StepDerivative, bits=2))
register_codec("step1", partial(StepDerivative, bits=1))
register_codec("fixed8", partial(FixedPoint, "fixed8", 3, 4))
register_codec("fixed4", partial(FixedPoint, "fixed4", 2, 1))
register_codec("ufixed8", partial(FixedPoint, "ufixed8", 0, 8, signed=False))
register_codec("crs", lambda rows="exact", **options: ColumnRowSampling(get_codec(rows), **options))
register_codec("topk10", partial(TopK, "topk10", 0.1))
