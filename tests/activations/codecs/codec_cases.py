"""Every codec with the options and the kind of data that its contract is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimfit_ds.activations.codecs import Codec, get_codec

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """A codec, by name and options, and how to make data for it from a normal sample."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Tensor], Tensor] = lambda x: x

    @property
    def codec(self) -> Codec:
        return get_codec(self.name, **self.options)

    @property
    def label(self) -> str:
        return "-".join([self.name, *(str(v) for v in self.options.values())])


CASES = [
    Case("exact"),
    Case("mask", prepare=lambda x: x > 0),
    *(
        Case(name, {"group": group, "rounding": rounding})
        for name, group in (
            ("int8", 64),
            ("int6", 64),
            ("int5", 64),
            ("int4", 32),
            ("int2", 32),
            ("int4", 24),
        )
        for rounding in ("nearest", "stochastic")
    ),
    Case("uint8", prepare=torch.abs),
    Case("crs", {"keep": 0.5}),
    Case("crs", {"keep": 0.25, "rows": "int8"}),
    *(Case(name) for name in ("lm4", "lm2", "lm1", "fixed8", "fixed4", "ufixed8", "topk10")),
    *(
        Case(f"step{bits}", {"activation": activation})
        for bits in (5, 4, 2, 1)
        for activation in ("gelu", "silu", "relu2")
    ),
]
