"""Every codec with the options that its contract is tested on."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from slimfit_ds.activations.codecs import Codec, get_codec

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """A codec, by name and options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def codec(self) -> Codec:
        return get_codec(self.name, **self.options)

    def fresh(self) -> Codec:
        """The codec with its own random numbers at their start."""
        codec = copy.deepcopy(self.codec)
        if hasattr(codec, "_generators"):
            codec._generators = {}
        return codec

    @property
    def label(self) -> str:
        return "-".join([self.name, *(str(v) for v in self.options.values())])


CASES = [
    *(Case(name) for name in ("exact", "int8_channel", "fixed8", "fixed4", "ufixed8", "topk10")),
    *(
        Case(name, {"group": group})
        for name, group in (("int8", 64), ("int6", 64), ("int4", 32), ("int4", 24))
    ),
    Case("crs", {"keep": 0.5}),
    Case("crs", {"keep": 0.25, "rows": "int8"}),
    *(Case(f"step{bits}", {"activation": name}) for bits in (5, 4, 1) for name in ("gelu", "relu2")),
]
