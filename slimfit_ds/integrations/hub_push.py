"""What `Trainer.push_to_hub` sends after a run: the delta, or the whole model, and a card that says what it is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import torch

from slimfit_ds.config import SlimFitConfig
from slimfit_ds.deltas.base import DeltaError, base_of, whole_name
from slimfit_ds.deltas.card import CARD, append_section, section
from slimfit_ds.deltas.delta import DELTA, Delta, filled, read_delta
from slimfit_ds.integrations.delta_checkpoints import trainer_in, write_as_weights
from slimfit_ds.trainable.units import named_tensors

__all__ = ["prepare_push"]

_log = logging.getLogger(__name__)

_NOTES = (
    "This repository holds what trained, not a model. Put it into its base: `hf download REPOSITORY --local-dir DELTA`, then "
    "`slimfit-ds merge BASE DELTA OUTPUT`, which writes a folder for transformers."
)


def prepare_push(model: Any, config: SlimFitConfig) -> None:
    """Called when a push begins and no training runs: what `push_to_hub` of a Trainer is about to write belongs to a run.

    Args:
        model: of transformers, whole; its weights are pushed unless `checkpoints` is `delta`.
        config: of the run.
    """
    trainer = trainer_in("push_to_hub")
    if trainer is None or not trainer.args.should_save:
        return
    directory = Path(trainer.args.output_dir)
    delta = _delta_of(model, directory) if config.checkpoints == "delta" else None
    if delta is not None:
        _once(
            trainer,
            model,
            "save_pretrained",
            lambda own, folder, **_: write_as_weights(own, delta, Path(folder)),
        )
    try:
        base = base_of(model)[1] if delta is None else delta.base
    except DeltaError:  # Made from a config, or of a GGUF file: Trainer's card has to do.
        return

    def create_model_card(own: Any, *args: Any, **kwargs: Any) -> None:
        own.create_model_card(*args, **kwargs)
        notes = _NOTES if delta is not None else ""
        append_section(directory / CARD, section(base, config.model_dump(mode="json"), notes=notes))

    _once(trainer, trainer, "create_model_card", create_model_card)


def _once(trainer: Any, target: Any, name: str, function: Callable[..., Any]) -> None:
    """Let a function take the place of a method for one call, out of this push; within it the method is there again."""
    before = target.__dict__.get(name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        target.__dict__.pop(name)
        if before is not None:
            target.__dict__[name] = before
        # A push that failed before has left this here for somebody else to call.
        pushes = trainer_in("push_to_hub") is trainer
        return (function if pushes else getattr(type(self), name))(self, *args, **kwargs)

    target.__dict__[name] = MethodType(call, target)


def _delta_of(model: Any, directory: Path) -> Delta | None:
    """The delta that the run has left, if the model is still what it says; None, with a line in the log, if not."""
    try:
        delta = read_delta(directory / DELTA)
    except DeltaError as error:
        _log.warning("the whole model is pushed: %s", error)
        return None
    present = dict(named_tensors(model))
    for name, values in filled(delta).items():
        whole = whole_name(name)
        own = present.get(whole)
        if own is not None and whole != name:
            own = delta.places[whole].of_weight(own)
        if own is None or not torch.equal(own.cpu(), values):
            _log.warning(
                "the whole model is pushed: %s has changed since %s was written", whole, directory / DELTA
            )
            return None
    return delta
