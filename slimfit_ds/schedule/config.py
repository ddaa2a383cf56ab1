"""The `freeze` block: which parts of the model train at each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from slimfit_ds.errors import StrictModel

__all__ = ["RECOMMENDED", "FreezeConfig", "RateSchedule"]


class RateSchedule(StrictModel):
    """A freezing rate that moves from `start` to `end` over the first `steps` optimizer steps."""

    start: float = Field(ge=0, lt=1)
    end: float = Field(ge=0, lt=1)
    steps: int = Field(gt=0, description="optimizer steps from start to end; constant afterwards")
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, step: int) -> float:
        """The rate at optimizer step `step` (the first step is 0)."""
        progress = min(step / self.steps, 1.0)
        if self.shape == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return self.start + (self.end - self.start) * progress


def _listed(value: Any) -> Any:
    if isinstance(value, list | tuple) and not value:
        raise ValueError("must name at least one of layers, parameters, activations, flops")
    return (value,) if isinstance(value, str) else value


RECOMMENDED: Mapping[str, Any] = {
    "policy": "columns",
}
"""What `policy: auto` stands for; the evidence is in docs/fidelity.md. Fields that the block states itself win."""


class FreezeConfig(StrictModel):
    """Which layers train at each step."""

    policy: str = Field(
        "ils",
        description="a registered policy: ils, columns, random, none, ...; auto: the recommended policy and settings",
    )
    rate: Annotated[float, Field(ge=0, lt=1)] | RateSchedule = Field(
        0.9, description="share of the layers that is frozen at each step, in [0, 1), or a schedule"
    )
    budget: Annotated[
        tuple[Literal["layers", "parameters", "activations", "flops"], ...], BeforeValidator(_listed)
    ] = Field(
        ("layers",),
        min_length=1,
        description="what the rate is a share of, for every active set: layers (the paper), parameters, "
        "activations (inputs kept for active weights), flops (of weight gradients), or a list of which all must hold",
    )
    interval: int = Field(1, ge=1, description="choose a new set every this many optimizer steps")
    refresh: int | None = Field(
        None, ge=1, description="a layer that has not trained for this many steps goes before all others"
    )
    lr_scale: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        1.0,
        description="factor of the learning rate of layers that the schedule chooses; auto: the square root of how "
        "many times more steps there were than this layer has trained",
    )
    always_lr_scale: float = Field(
        1.0, gt=0, description="factor of the learning rate of biases and of always-active layers"
    )
    embedding_lr_scale: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="factor of the learning rate of the word embedding's trained columns (policy columns); auto: the "
        "square root of all columns over trained ones, so that a vector moves as far as if all of it trained",
    )
    statistic: str = Field(
        "relative_update", description="how much a layer learned in a step, by its update or its gradient"
    )
    always_active: tuple[str, ...] = Field((), description="globs of layers that train at every step")
    never_active: tuple[str, ...] = Field((), description="globs of layers that never train")
    head: Literal["scheduled", "always"] = Field(
        "scheduled",
        description="always: the last linear layer behind the blocks trains at every step, where it is no larger "
        "than the layers of the blocks and takes up at most half of the budget",
    )
    train_biases: bool = Field(True, description="biases and norm biases train at every step")
    seed: int = Field(0, ge=0, description="seed of the first, random order and of random policies")
    check_interval: int = Field(
        1, ge=0, description="compare the active set across ranks every this many steps; 0: never"
    )

    @model_validator(mode="before")
    @classmethod
    def _recommended(cls, data: Any) -> Any:
        """`policy: auto` fills in what the block does not say."""
        if isinstance(data, Mapping) and data.get("policy") == "auto":
            return {**RECOMMENDED, **{key: value for key, value in data.items() if key != "policy"}}
        return data

    @property
    def rates(self) -> tuple[float, ...]:
        """The extreme rates of a run."""
        return (self.rate.start, self.rate.end) if isinstance(self.rate, RateSchedule) else (self.rate,)

    def rate_at(self, step: int) -> float:
        """The share of frozen layers at optimizer step `step`."""
        return self.rate.at(step) if isinstance(self.rate, RateSchedule) else self.rate
