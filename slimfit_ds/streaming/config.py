"""The `frozen_weights` block: where the weights live that never train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from slimfit_ds.errors import StrictModel

__all__ = ["FrozenWeightsConfig"]


class FrozenWeightsConfig(StrictModel):
    """Where the weights of the blocks live that never train."""

    live: Literal["device", "host", "auto"] = Field(
        "device",
        description="host: blocks take turns in a few buffers of the device, into which they are copied in time. auto: host if a "
        "simulated step would not fit otherwise (slimfit_ds.initialize with training_data)",
    )
    resident: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        0,
        description="with live: host, how many blocks (the last ones) stay on the device all the same. auto: as many as fit",
    )
    buffers: int = Field(
        2, ge=2, description="with live: host, how many blocks have room on the device at a time"
    )

    columns: Literal["device", "host"] = Field(
        "device",
        description="with live: host, where the trained columns of the streamed blocks and their gradients live. host: they come "
        "with their block and go as soon as they are made (slimfit_ds.initialize)",
    )

    @property
    def kept(self) -> int:
        """How many blocks stay on the device as far as it is decided."""
        return 0 if self.resident == "auto" else self.resident

    @property
    def undecided(self) -> list[str]:
        """What the planner has to decide, a line each for who cannot ask it."""
        return [
            f"slimfit.frozen_weights.{name} 'auto': only slimfit_ds.initialize with training_data decides it, by simulating a "
            f"step; set {remedy}, or take the settings that `slimfit-ds plan` writes"
            for name, remedy in (("live", "device or host"), ("resident", "a number"))
            if getattr(self, name) == "auto"
        ]

    @model_validator(mode="after")
    def _needs_host(self) -> FrozenWeightsConfig:
        if self.live == "device" and (self.resident, self.buffers, self.columns) != (0, 2, "device"):
            raise ValueError(
                f"resident {self.resident}, buffers {self.buffers} and columns {self.columns} do nothing while all blocks live on "
                "the device: set live to host, or leave them out"
            )
        return self
