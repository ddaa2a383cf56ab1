"""The `optimizer_states` block: where optimizer states live and what becomes of them while their layer is frozen."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from pydantic import Field, field_validator

from slimfit_ds.errors import StrictModel

__all__ = ["OptimizerStatesConfig"]


class OptimizerStatesConfig(StrictModel):
    """Where optimizer states live and what becomes of them while their layer is frozen."""

    inactive: Literal["device", "host"] = Field(
        "device", description="where the states of frozen layers live"
    )
    active: Literal["device", "host"] = Field(
        "device",
        description="host: the states of layers that train are on the device only while their layer is updated, and those of "
        "frozen layers are on the host too",
    )
    stale_moments: Literal["keep", "decay", "reset"] = Field(
        "keep",
        description="moments of a layer that returns: as they were, decayed by the missed steps, or zero",
    )
    precision: Literal["fp32", "8bit"] = Field(
        "fp32", description="storage of Adam's moments (8bit: torchao)"
    )
    bf16_weights: Literal["master", "stochastic_rounding"] = Field(
        "master", description="bf16 training with fp32 master weights, or without and rounded stochastically"
    )

    @field_validator("precision")
    @classmethod
    def _needs_torchao(cls, value: str) -> str:
        if value == "8bit" and find_spec("torchao") is None:
            raise ValueError("8bit needs torchao: pip install 'slimfit_ds[low-bit]'")
        return value
