"""The `"activations"` block: how tensors kept for the backward pass are stored.

    {"preset": "balanced",
     "operations": {"norm": "int8"},
     "layers": {"encoder.layer.0.*": {"attention": "exact"}},
     "chunk_tokens": 2048}

A preset is a table from operation to codec. `operations` overrides single entries for the whole model, `layers`
for the modules whose name matches a glob (later globs win). A codec is a registered name or a mapping with options,
`{"name": "int8", "group": 128}`.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

__all__ = ["OPERATIONS", "PRESETS", "ActivationsConfig", "OperationTable"]

CodecSpec = str | dict[str, Any]


class OperationTable(BaseModel):
    """Operation -> codec. `exact` leaves an operation to autograd as it is.

    The block operation takes precedence: inside a checkpointed block nothing else is stored.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: CodecSpec = Field(
        "exact",
        description="input of a block, which is recomputed from it; recompute: from the input as it is; with an option "
        "every: 2 only that of every second block, from which the next block's is recomputed too",
    )
    norm: CodecSpec = Field("exact", description="normalised input of LayerNorm and RMSNorm")
    active_norm: CodecSpec | None = Field(
        None, description="the same while the norm's weight trains; null: as `norm`"
    )
    consumers: CodecSpec = Field(
        "exact",
        description="recomputed from what the norms store: attention (in every block), or gated (attention and the up "
        "projection, in blocks with a gated MLP)",
    )
    source_norm: CodecSpec | None = Field(
        None,
        description="normalised input of norms that consumers are recomputed from, and of those outside of the blocks, "
        "whose error reaches every block; null: as any norm",
    )
    activation: CodecSpec = Field(
        "exact",
        description="GELU, SiLU and the like: step5, step4, step2 or step1 store the derivative, others the input",
    )
    attention: CodecSpec = Field("exact", description="queries, keys and values")
    values: CodecSpec | None = Field(
        None, description="the values alone, where attention is not exact; null: as `attention`"
    )
    probabilities: CodecSpec = Field(
        "recompute", description="softmax output: recompute from the stored queries and keys, or a codec"
    )
    dropout: CodecSpec = Field(
        "exact",
        description="also of attention's probabilities; replay: random state instead of a mask; philox: likewise, with "
        "masks of its own made in one kernel each way; mask: one bit per element",
    )
    linear: CodecSpec = Field("exact", description="input of a linear layer or convolution that trains")
    wide_linear: CodecSpec = Field("exact", description="the same where the input is wider than the output")
    product: CodecSpec = Field(
        "exact", description="other tensors a block keeps, such as the factors of gate * up"
    )


OPERATIONS = tuple(OperationTable.model_fields)

PRESETS = MappingProxyType(
    {
        "exact": OperationTable(),
        # Ardakani et al. 2023 (arXiv 2305.18513), section 4: for comparison with their numbers.
        "paper": OperationTable(
            norm="topk10",
            active_norm="exact",
            activation="fixed4",
            attention="fixed8",
            probabilities="ufixed8",
            wide_linear="fixed8",
        ),
        # Encoders: each operation stores its own input, no linear layer runs twice. The codecs share an error of 0.05: a
        # weight of a norm takes its gradient from x_hat itself, so that one gets more bits while it trains.
        # Decoders with a gated MLP: queries, keys, gate and up have outliers that few bits lose and are most of the bytes, so
        # attention and up come again from the norms.
        "balanced": OperationTable(
            norm="int4",
            active_norm="int6",
            consumers="gated",
            source_norm="int8_channel",
            activation={"name": "step5", "scale": 2.0},
            attention={"name": "int6", "group": 128},
            dropout="philox",
            linear="int8",
            wide_linear="int6",
            product="int8",
        ),
        "minimal": OperationTable(block="int8_channel", norm="int8", activation="step4", dropout="replay"),
        "ultra": OperationTable(
            block={"name": "int8_channel", "every": 2}, norm="int8", activation="step4", dropout="replay"
        ),
    }
)

LARGEST_ERROR = MappingProxyType(
    {"exact": 1e-3, "paper": 1.0, "balanced": 0.1, "minimal": 0.06, "ultra": 0.06}
)
"""Largest relative error of a block's gradients that a preset has (docs/activations.md)."""

_GONE = {"lean": "minimal, which has as small an error at half the bytes"}


def _near(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or the list of what is known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


class ActivationsConfig(BaseModel):
    """How tensors kept for the backward pass are stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = Field("exact", description="exact, paper, balanced, minimal or ultra")
    operations: dict[str, CodecSpec | None] = Field({}, description="operation -> codec, over the preset")
    layers: dict[str, dict[str, CodecSpec | None]] = Field(
        {}, description="glob of module names -> {operation: codec}, over the preset and `operations`"
    )
    chunk_tokens: int | None = Field(
        4096,
        ge=1,
        description="recompute about this many tokens at a time, of a longer sample tile by tile; null: the whole batch",
    )
    chunk_loss_tokens: int | None = Field(
        None,
        ge=1,
        description="a language model's head and loss for this many tokens at a time; null: at once",
    )
    chunk_forward: bool = Field(
        True,
        description="run the forward pass of recomputed parts in the same chunks, unless a result of theirs belongs "
        "to no sample; false: the whole batch at once, where nothing random is drawn",
    )
    offload: bool = Field(
        False,
        description="what recomputed blocks keep lives in host memory between forward and backward pass",
    )
    compile: bool = Field(
        False,
        description="blocks that train some of their columns, or no weight, run through torch.compile; where blocks are "
        "recomputed, or nothing is compressed",
    )

    proof: bool = Field(
        True,
        description="compare each changed block with itself unchanged on the first batch, and leave exact what differs",
    )
    strict: bool = Field(
        False, description="what the proof finds is an error, before the first optimizer step"
    )

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value in _GONE:
            raise ValueError(f"preset {value!r} is gone; use {_GONE[value]}")
        if value not in PRESETS:
            raise ValueError(f"unknown preset {value!r}; {_near(value, PRESETS)}")
        return value

    @field_validator("operations")
    @classmethod
    def _known_operations(cls, value: dict[str, CodecSpec | None]) -> dict[str, CodecSpec | None]:
        problems = _operation_problems(value)
        if problems:
            raise ValueError("; ".join(problems))
        return value

    @field_validator("layers")
    @classmethod
    def _known_layer_operations(
        cls, value: dict[str, dict[str, CodecSpec | None]]
    ) -> dict[str, dict[str, CodecSpec | None]]:
        problems = [
            f"{glob!r}: {text}" for glob, table in value.items() for text in _operation_problems(table)
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return value

    def table(self, module: str | None = None) -> OperationTable:
        """Operation -> codec for a module.

        Args:
            module: its name in the model; `None`: where no layer glob applies.
        """
        changes = dict(self.operations)
        for glob, table in self.layers.items():
            if module is not None and fnmatch.fnmatchcase(module, glob):
                changes |= table
        return PRESETS[self.preset].model_copy(update=changes)

    @property
    def largest_error(self) -> float:
        """Of a block's gradients: that of the preset, or of the coarsest where operations name codecs of their own."""
        named = [spec for table in (self.operations, *self.layers.values()) for spec in table.values()]
        own = any(spec not in ("exact", "recompute", None) for spec in named)
        return LARGEST_ERROR["paper" if own else self.preset]

    def unmatched_layers(self, modules: Iterable[str]) -> list[str]:
        """One line for each layer glob that no module name matches, with near names."""
        names = list(modules)
        return [
            f"activations.layers {glob!r} matches no module; {_near(glob, names[:200])}"
            for glob in self.layers
            if not fnmatch.filter(names, glob)
        ]


def _operation_problems(table: dict[str, CodecSpec | None]) -> list[str]:
    optional = [name for name, field in OperationTable.model_fields.items() if field.default is None]
    problems = [
        f"operation {name!r} needs a codec, got null; only {', '.join(optional)} may be null"
        for name, spec in table.items()
        if spec is None and name in OPERATIONS and name not in optional
    ]
    problems += [
        f"unknown operation {name!r}, {_near(name, OPERATIONS)}" for name in table if name not in OPERATIONS
    ]
    problems += [
        f"operation {name!r}: a codec given as a mapping needs a 'name', got {spec!r}"
        for name, spec in table.items()
        if isinstance(spec, dict) and not isinstance(spec.get("name"), str)
    ]
    return problems
