"""What became of each module."""

from __future__ import annotations

from dataclasses import dataclass

from slimfit_ds.activations.config import CodecSpec

__all__ = ["Row", "describe"]


@dataclass(frozen=True)
class Row:
    """One module and what its tensors are stored as.

    Attributes:
        module: its name in the model.
        kind: the operation it was taken for.
        codec: what its tensors are stored as; `exact`: left to autograd.
        reason: how it was recognised, or why it was left alone.
    """

    module: str
    kind: str
    codec: str
    reason: str


def describe(spec: CodecSpec) -> str:
    """A codec specification in one word: `int8(group=128)`."""
    if isinstance(spec, str):
        return spec
    options = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}({options})"
