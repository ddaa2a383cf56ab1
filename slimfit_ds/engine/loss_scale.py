"""What DeepSpeed's loss scaler has to remember over a restart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["restore_scaler", "scaler_state"]

_REMEMBERED = {"cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"}


def scaler_state(scaler: Any) -> dict[str, Any]:
    """The numbers of a loss scaler, static or dynamic, as JSON types."""
    return {key: value for key, value in vars(scaler).items() if key in _REMEMBERED}


def restore_scaler(scaler: Any, state: Mapping[str, Any]) -> None:
    """The counterpart of `scaler_state`; a static scaler keeps what its configuration says."""
    if scaler.dynamic:
        for key, value in state.items():
            setattr(scaler, key, value)
