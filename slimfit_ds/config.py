"""The `"slimfit"` block of a DeepSpeed configuration, as pydantic models.

The block stands at the top level of the DeepSpeed JSON (DeepSpeed lets unknown top-level keys pass):

    {"train_batch_size": 32, "zero_optimization": {"stage": 1},
     "slimfit": {"freeze": {"rate": 0.9},
                 "activations": {"preset": "minimal"}}}

Every field has a default, and an empty block is the recommended setting; unknown keys are errors; all errors of a block are reported together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from slimfit_ds.activations.config import ActivationsConfig
from slimfit_ds.errors import ConfigError, StrictModel, describe_validation_error, parse_bytes
from slimfit_ds.optim.config import OptimizerStatesConfig
from slimfit_ds.schedule.config import FreezeConfig
from slimfit_ds.streaming.config import FrozenWeightsConfig

__all__ = ["SlimFitConfig"]


def _budget(value: Any) -> Any:
    return value if value is None or value == "auto" else parse_bytes(value)


class SlimFitConfig(StrictModel):
    """The whole `"slimfit"` block."""

    freeze: FreezeConfig = FreezeConfig()
    activations: ActivationsConfig = ActivationsConfig()
    optimizer_states: OptimizerStatesConfig = OptimizerStatesConfig()
    frozen_weights: FrozenWeightsConfig = FrozenWeightsConfig()
    checkpoints: Literal["whole", "delta"] = Field(
        "whole",
        description="weights in a checkpoint. whole: all of them. delta: what has trained, and the identity of the base that the "
        "rest is of; the base must still be there to go on",
    )
    memory_budget: Annotated[int | Literal["auto"] | None, BeforeValidator(_budget)] = Field(
        None, description="bytes per device (24GB, 24GiB), or auto: what the device has free"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset_name(cls, data: Any) -> Any:
        """`"activations": "minimal"` is short for `{"preset": "minimal"}`."""
        if isinstance(data, Mapping) and isinstance(data.get("activations"), str):
            return {**data, "activations": {"preset": data["activations"]}}
        return data

    @model_validator(mode="after")
    def _compiles_one_pattern(self) -> SlimFitConfig:
        freeze = self.freeze
        if self.activations.compile and freeze.splits and freeze.policy not in ("static", "none"):
            raise ValueError(
                f"activations.compile is true, and freeze.policy {freeze.policy!r} trains other columns of a block at each step, each "
                "time another graph: use policy static, or leave freeze.width out"
            )
        return self

    @classmethod
    def parse(cls, block: SlimFitConfig | Mapping[str, Any] | None, prefix: str = "slimfit") -> SlimFitConfig:
        """The validated block.

        Args:
            block: the block as a mapping; `None` stands for all defaults.
            prefix: where the block stands, for the error messages.

        Raises:
            ConfigError: all problems of the block, a line each, naming key, value and remedy.
        """
        if isinstance(block, SlimFitConfig):
            return block
        try:
            # A block that is no mapping is a problem to report as well.
            return cls.model_validate(
                {} if block is None else dict(block) if isinstance(block, Mapping) else block
            )
        except ValidationError as error:
            raise ConfigError(describe_validation_error(error, cls, prefix)) from None
