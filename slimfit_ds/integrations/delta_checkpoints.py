"""Checkpoints of a Trainer that hold what trained: the Trainer writes and reads them by methods of its model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn

from slimfit_ds.deltas.delta import Delta, Source, from_state, whole_state, write_into

__all__ = ["lead_checkpoints"]

_NO_CONFIG = {
    "model_type": "slimfit_delta",
    "hidden_size": "no model, only what trained of one: slimfit-ds merge BASE model.safetensors OUT",
}
"""Keeps `from_pretrained` from taking such a folder for a model, most of which would be new."""


def lead_checkpoints(model: Any, source: Source, capture: Callable[[], Delta | None]) -> None:
    """Let a Trainer's `checkpoint-N` have a delta for its `model.safetensors`, and let the model load it.

    `save_pretrained` called by anybody else writes the whole model. A model that has been led stays so.

    Args:
        model: of transformers.
        source: of the model.
        capture: what has trained; None: the checkpoint has it elsewhere (the engine's), and no weights are written.
    """

    def save_pretrained(
        self: Any, directory: str | os.PathLike, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> Any:
        if not _called_by("_save_checkpoint"):
            return type(self).save_pretrained(
                self, directory, *args, is_main_process=is_main_process, **kwargs
            )
        Path(directory).mkdir(parents=True, exist_ok=True)
        if is_main_process and (delta := capture()) is not None:
            write_into(delta, Path(directory) / "model.safetensors", as_state=True)
            Path(directory, "config.json").write_text(json.dumps(_NO_CONFIG))
        return None

    # Bound, so that a deep copy of the model saves itself.
    model.save_pretrained = MethodType(save_pretrained, model)

    def complete(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix or (delta := from_state(state)) is None:
            return
        whole_weights = whole_state(module, source, delta)
        state.clear()
        state.update(whole_weights)
        source.forget()

    model.register_load_state_dict_pre_hook(complete)


def _called_by(name: str) -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == name:
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
