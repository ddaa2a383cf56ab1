"""Checkpoints of a stock DeepSpeed engine, written whole or not at all, and read without running code of theirs.

DeepSpeed writes its files straight into their place, and unpickles them with all that pickles may do.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from slimfit_ds.engine.checkpoint_files import CheckpointError, flush, part_of, publish

__all__ = ["load_stock", "save_stock"]


def save_stock(engine: Any, place: Path, tag: str, client_state: Mapping[str, Any]) -> None:
    """Write a checkpoint of a stock engine; called by every rank.

    Args:
        engine: a DeepSpeed engine.
        place: folder of the checkpoints; `latest` in it names this one in the end.
        tag: name of the checkpoint.
        client_state: of the loop, of plain types.
    """
    part = part_of(place, tag)
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(place), tag=part.name, client_state=dict(client_state), save_latest=False)
        if dist.get_rank() == 0:
            for path in part.rglob("*"):
                flush(path)
            publish(place, tag)
    except Exception:
        shutil.rmtree(part, ignore_errors=True)
        raise
    dist.barrier()


def load_stock(engine: Any, place: Path, tag: str) -> tuple[str | None, dict[str, Any]]:
    """Go on from a checkpoint of a stock engine; called by every rank.

    Returns:
        the checkpoint's path and its client state.

    Raises:
        CheckpointError: it holds anything but tensors and plain values.
    """
    reader = engine.checkpoint_engine
    reader.load = _load_plain
    try:
        path, state = engine.load_checkpoint(str(place), tag=tag)
    finally:
        del reader.load
    return path, state or {}


def _load_plain(path: str, map_location: Any = None) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path} holds more than tensors and plain values, and is not loaded ({reason})"
        ) from None
