"""The `"activations"` block: how tensors kept for the backward pass are stored."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["ActivationsConfig"]


class ActivationsConfig(BaseModel):
    """How tensors kept for the backward pass are stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str = Field("exact", description="exact, paper, balanced, lean, minimal or ultra")
