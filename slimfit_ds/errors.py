"""Errors of a configuration: every problem at once, each naming key, value and remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["ConfigError", "StrictModel", "describe_validation_error", "parse_bytes"]

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}
_UNITS |= {"kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4}


class ConfigError(ValueError):
    """Every problem of a configuration at once; `problems` holds one line each."""

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        # By default it would be made again of its text, between processes.
        return type(self), (self.problems,)


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


class StrictModel(BaseModel):
    """A frozen block of a configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gone: ClassVar[Mapping[str, str]] = {}
    """Keys of earlier versions -> what to do instead."""


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
            text = f"{key} {_unknown(model, path)}"
        else:
            message = item["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
            shown = "" if isinstance(value, Mapping) or repr(value) in message else f", got {value!r}"
            text = f"{key}: {message}{shown}" if not message.startswith("must") else f"{key} {message}{shown}"
        lines.setdefault(text, text)
    return list(lines)


def _is_union_tag(part: Any) -> bool:
    """Pydantic puts the branch of a union into the location; users never wrote it."""
    return isinstance(part, str) and (
        part in {"float", "int", "str", "constrained-float"}
        or part.startswith(("function-", "literal[", "constrained-"))
    )


def _unknown(model: type[BaseModel], path: list[str]) -> str:
    """What to say of an unknown key: what has become of it, or the keys that would be right at its place."""
    import difflib

    current = model
    for part in path[:-1]:
        field = current.model_fields.get(part)
        if field is None:
            return "is not a known key"
        candidates = getattr(field.annotation, "__args__", (field.annotation,))
        blocks = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not blocks:
            return "is not a known key"
        current = blocks[0]
    if path[-1] in getattr(current, "gone", {}):
        return f"is gone: {current.gone[path[-1]]}"  # type: ignore[attr-defined]
    names = list(current.model_fields)
    near = difflib.get_close_matches(path[-1], names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
    return f"is not a known key; {hint}"
