"""The `freeze` block: which parts of the model train at each step."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from slimfit_ds.errors import StrictModel
from slimfit_ds.schedule.front import FRONTS
from slimfit_ds.schedule.policies import POLICIES

__all__ = ["RECOMMENDED", "FreezeConfig"]

RECOMMENDED = "static"
"""What `policy: auto` stands for; the evidence is in docs/fidelity.md."""

_GONE_POLICIES = {
    "columns": "use static",
    "progressive": "use ils, or static, which measured best",
    "top_gradient": "use ils, or static, which measured best",
    "ils_per_cost": "use ils with budget: parameters",
}


def _policy(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value == "auto":
        return RECOMMENDED
    if value in _GONE_POLICIES:
        raise ValueError(f"{value!r} is gone: {_GONE_POLICIES[value]}")
    if value not in POLICIES:
        near = difflib.get_close_matches(value, POLICIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown {value!r}; {hint}known: auto, {', '.join(POLICIES)}")
    return value


def _rate(value: Any) -> Any:
    if isinstance(value, Mapping):
        raise ValueError("a schedule of rates is gone: give one number in [0, 1)")
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        raise ValueError(f"must be in [0, 1), got {value!r}")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise ValueError(f"must be in [0, 1), got {value!r}")
    return number


def _budget(value: Any) -> Any:
    if isinstance(value, list | tuple) or value in ("activations", "flops"):
        raise ValueError(f"{value!r} is gone: choose one of layers, parameters")
    return value


def _front(value: Any) -> Any:
    if value not in ("none", *FRONTS):
        raise ValueError(f"must be one of none, {', '.join(FRONTS)}, got {value!r}")
    return value


class FreezeConfig(StrictModel):
    """Which parts of the model train at each step."""

    gone: ClassVar[Mapping[str, str]] = {
        "refresh": "remove it, or choose policy static, under which every unit trains at every step",
        "statistic": "remove it: policies measure the relative update",
        "head": "name the head in always_active, such as [classifier]",
    }

    policy: Annotated[str, BeforeValidator(_policy)] = Field(
        RECOMMENDED,
        description="which units train at a step. auto, the default, is static: some input columns of every layer, at "
        "every step. ils, random, lisa, badam, far, bsr: a new choice of units from step to step. none: no freezing",
    )
    rate: Annotated[float, BeforeValidator(_rate)] = Field(
        0.9, description="share of the model that is frozen at each step, in [0, 1)"
    )
    width: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of a layer's input columns that can train. null: for static, what the rate leaves; for the "
        "choosing policies 1, whole layers",
    )
    budget: Annotated[Literal["layers", "parameters"], BeforeValidator(_budget)] = Field(
        "layers",
        description="what the rate of a choosing policy is a share of: layers (the paper; a narrow unit counts as its "
        "width), or parameters",
    )
    front: Annotated[str, BeforeValidator(_front)] = Field(
        "none",
        description="where the backward pass of a step ends; blocks below rest and have no graph. none: every step goes down "
        "the whole way. half: every other one, the others to the middle. statistics: blocks train as often as they learn",
    )
    interval: int = Field(1, ge=1, description="choose new units every this many optimizer steps")
    lr_scale: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="factor of the learning rate of narrow units and of units that a policy chooses; auto: all columns "
        "of a layer over trained ones, so that the rate of full fine-tuning is the right one",
    )
    always_lr_scale: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="factor of the learning rate of what trains whole at every step: biases, always_active layers, and "
        "beside narrow units the norms and the head; auto: that of the narrow units, as long as lr_scale is auto",
    )
    embedding_lr_scale: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto",
        description="factor of the learning rate of the word embedding's trained columns, beside lr_scale; auto: the "
        "square root of all columns over trained ones, so that a vector moves as far as if all of it trained",
    )
    always_active: tuple[str, ...] = Field((), description="globs of layers that train whole at every step")
    never_active: tuple[str, ...] = Field((), description="globs of layers that never train")
    train_biases: bool = Field(True, description="biases and norm biases train at every step")
    seed: int = Field(0, ge=0, description="seed of the trained columns, the first order and random choices")
    check_interval: int = Field(
        1, ge=0, description="compare the choice across ranks every this many steps; 0: never"
    )

    @model_validator(mode="before")
    @classmethod
    def _rate_of_width(cls, data: Any) -> Any:
        """Of units that all train at every step the width alone says what is frozen."""
        if (
            isinstance(data, Mapping)
            and data.get("policy", "auto") in ("auto", "static")
            and "rate" not in data
        ):
            width = data.get("width")
            if isinstance(width, int | float) and 0 < width <= 1:
                return {**data, "rate": 1 - width}
        return data

    @model_validator(mode="after")
    def _width_of_rate(self) -> FreezeConfig:
        if self.width is None:
            return self
        if self.policy == "static" and not math.isclose(self.width, 1 - self.rate, abs_tol=1e-6):
            raise ValueError(
                f"width {self.width:g} contradicts rate {self.rate:g}: with policy static every unit trains at every "
                f"step, so leave one of them out, or let a policy such as ils choose among narrow units"
            )
        if self.policy == "none" and self.width < 1:
            raise ValueError(f"width {self.width:g} needs a policy that freezes: use static, or leave it out")
        return self

    @model_validator(mode="after")
    def _front_of_all(self) -> FreezeConfig:
        if self.front != "none" and not POLICIES[self.policy].trains_all:
            raise ValueError(
                f"front {self.front} needs a policy under which everything above it trains, static or none: {self.policy} "
                f"chooses among all layers"
            )
        return self

    @property
    def splits(self) -> bool:
        """Whether layers are split into narrow units."""
        return self.policy == "static" and self.rate > 0 if self.width is None else self.width < 1
