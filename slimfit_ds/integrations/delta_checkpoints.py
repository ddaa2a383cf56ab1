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
from torch.utils.hooks import RemovableHandle

from slimfit_ds.deltas.delta import Delta, Source, from_state, whole_state, write_into

__all__ = ["forget_read", "has_read", "read_deltas", "trainer_in", "write_as_weights", "write_deltas"]

_NO_CONFIG = {
    "model_type": "slimfit_delta",
    "hidden_size": "no model, only what trained of one: slimfit-ds merge BASE model.safetensors OUT",
}
"""Keeps `from_pretrained` from taking such a folder for a model, most of which would be new."""


_READ = "slimfit_delta_read"
"""Attribute of a model into which a delta was loaded, until `forget_read` is called."""


def write_deltas(
    model: Any, capture: Callable[[], Delta | None], of: Callable[[Any], bool]
) -> Callable[[], None]:
    """Let a Trainer's `checkpoint-N` have a delta for its `model.safetensors`.

    `save_pretrained` called by anybody else writes the whole model.

    Args:
        model: of transformers.
        capture: what has trained; None: the checkpoint has it elsewhere (the engine's), and no weights are written.
        of: whether a Trainer that saves is the one that this is meant for.

    Returns:
        what undoes this.
    """
    before = model.__dict__.get("save_pretrained")

    def save_pretrained(
        self: Any, directory: str | os.PathLike, *args: Any, is_main_process: bool = True, **kwargs: Any
    ) -> Any:
        trainer = trainer_in("_save_checkpoint")
        if trainer is None or not of(trainer):
            return type(self).save_pretrained(
                self, directory, *args, is_main_process=is_main_process, **kwargs
            )
        Path(directory).mkdir(parents=True, exist_ok=True)
        if is_main_process and (delta := capture()) is not None:
            write_as_weights(self, delta, Path(directory))
        return None

    # Bound, so that a deep copy of the model saves itself, and a pickled one has the method of its class.
    model.save_pretrained = MethodType(save_pretrained, model)

    def undo() -> None:
        del model.save_pretrained
        if before is not None:
            model.save_pretrained = before

    return undo


def write_as_weights(model: Any, delta: Delta, directory: Path) -> None:
    """Write a delta where a model's weights would stand, and its settings for generation."""
    write_into(delta, directory / "model.safetensors", as_state=True)
    Path(directory, "config.json").write_text(json.dumps(_NO_CONFIG))
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(directory)


def read_deltas(model: nn.Module, source: Source) -> RemovableHandle:
    """Let a model load deltas as it loads whole weights.

    Returns:
        its `remove` undoes this.
    """
    return model.register_load_state_dict_pre_hook(_Complete(source))


class _Complete:
    """Makes whole weights of a delta that is about to be loaded. A class, so that the model can be pickled."""

    def __init__(self, source: Source):
        self._source = source

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix or (delta := from_state(state)) is None:
            return
        whole_weights = whole_state(module, self._source, delta)
        state.clear()
        state.update(whole_weights)
        self._source.forget()
        module.__dict__[_READ] = True


def has_read(model: nn.Module) -> bool:
    """Whether the model has loaded a delta since `forget_read`."""
    return _READ in model.__dict__


def forget_read(model: nn.Module) -> None:
    """Leave nothing on the model that says that it has loaded a delta."""
    model.__dict__.pop(_READ, None)


def trainer_in(method: str) -> Any:
    """The Trainer of which a method runs now; None: it does not."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == method and "self" in frame.f_locals:
            return frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None
