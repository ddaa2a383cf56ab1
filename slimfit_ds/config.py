"""The `"slimfit"` block of a DeepSpeed configuration, as pydantic models.

The block stands at the top level of the DeepSpeed JSON (DeepSpeed lets unknown top-level keys pass):

    {"train_batch_size": 32, "zero_optimization": {"stage": 1},
     "slimfit": {"freeze": {"policy": "ils", "rate": 0.9},
                 "activations": {"preset": "minimal"},
                 "optimizer_states": {"inactive": "host"}}}

Every field has a default; unknown keys are errors; all errors of a block are reported together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from slimfit_ds.activations.config import ActivationsConfig

__all__ = [
    "RECOMMENDED",
    "ConfigError",
    "FreezeConfig",
    "OptimizerStatesConfig",
    "RateSchedule",
    "SlimFitConfig",
    "describe_validation_error",
    "parse_bytes",
]

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}
_UNITS |= {"kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4}


class ConfigError(ValueError):
    """Every problem of a configuration at once; `problems` holds one line each."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def parse_bytes(value: str | int | float) -> int:
    """Bytes of a human-readable size: `24GB` (10^9), `24GiB` (2^30), `512 MB` or a plain number.

    Raises:
        ValueError: the text is no size, or is not positive.
    """
    if isinstance(value, bool):
        raise ValueError(f"must be a size such as 24GB or 24GiB, got {value!r}")
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(value))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"must be a size such as 24GB or 24GiB, got {value!r}")
    size = float(match[1]) * _UNITS[match[2].lower()]
    if not math.isfinite(size) or size < 1:
        raise ValueError(f"must be at least one byte, got {value!r}")
    return int(size)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RateSchedule(_Model):
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


class FreezeConfig(_Model):
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


class OptimizerStatesConfig(_Model):
    """Where optimizer states live and what becomes of them while their layer is frozen."""

    inactive: Literal["device", "host"] = Field(
        "device", description="where the states of frozen layers live"
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


def _budget(value: Any) -> Any:
    return value if value is None or value == "auto" else parse_bytes(value)


class SlimFitConfig(_Model):
    """The whole `"slimfit"` block."""

    freeze: FreezeConfig = FreezeConfig()
    activations: ActivationsConfig = ActivationsConfig()
    optimizer_states: OptimizerStatesConfig = OptimizerStatesConfig()
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
            return cls.model_validate(dict(block) if block is not None else {})
        except ValidationError as error:
            raise ConfigError(describe_validation_error(error, cls, prefix)) from None


def describe_validation_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """One line for each problem: `slimfit.freeze.rate must be in [0, 1), got 1.5`."""
    lines: dict[str, str] = {}
    for item in error.errors():
        unknown = item["type"] == "extra_forbidden"
        # The last part of an unknown key's place was written by the user, even if it reads like a branch.
        inner, last = (item["loc"][:-1], item["loc"][-1:]) if unknown else (item["loc"], ())
        path = [str(part) for part in inner if not _is_union_tag(part)] + [str(part) for part in last]
        key = ".".join([prefix, *path] if prefix else path)
        value = item.get("input")
        if unknown:
            text = f"{key} is not a known key{_suggestion(model, path)}"
        elif path and path[-1] == "rate" and not isinstance(value, Mapping):
            text = f"{key} must be in [0, 1), got {value!r}"
        else:
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            shown = "" if isinstance(value, Mapping) or repr(value) in message else f", got {value!r}"
            text = f"{key}: {message}{shown}" if not message.startswith("must") else f"{key} {message}{shown}"
        lines.setdefault(text, text)
    return list(lines)


def _is_union_tag(part: Any) -> bool:
    """Pydantic puts the branch of a union into the location; users never wrote it."""
    return isinstance(part, str) and (
        part in {"float", "int", "str", "RateSchedule", "constrained-float"}
        or part.startswith(("function-", "literal[", "constrained-"))
    )


def _suggestion(model: type[BaseModel], path: list[str]) -> str:
    """The keys that would be right at the place where an unknown one stands."""
    import difflib

    current = model
    for part in path[:-1]:
        field = current.model_fields.get(part)
        if field is None:
            return ""
        candidates = getattr(field.annotation, "__args__", (field.annotation,))
        blocks = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not blocks:
            return ""
        current = blocks[0]
    names = list(current.model_fields)
    near = difflib.get_close_matches(path[-1], names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(names)}"
