"""Checkpoints that another world size, ZeRO stage or residency can go on from, and that run no code.

The files are those of `engine.checkpoint_files`. Everything is written into a temporary folder, flushed to disk,
renamed, and only then named in `latest`: whatever happens in between, `latest` names a whole checkpoint. All ranks
must see one file system.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from deepspeed import comm as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from slimfit_ds.engine import random_state, weights
from slimfit_ds.engine.checkpoint_files import (
    FORMAT,
    METADATA,
    MODEL,
    CheckpointError,
    flush,
    latest_tag,
    part_of,
    publish,
    read_metadata,
    recover,
)
from slimfit_ds.engine.shard_files import ShardReader, write_shards
from slimfit_ds.errors import ConfigError
from slimfit_ds.trainable.columns import column_places, fill_columns
from slimfit_ds.trainable.split_modules import Split

if TYPE_CHECKING:
    from slimfit_ds.engine.engine import SlimFitEngine

__all__ = ["CheckpointError", "latest_tag", "load", "save"]

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def save(
    engine: SlimFitEngine,
    directory: str | os.PathLike,
    tag: str | None,
    client_state: Mapping[str, Any],
    save_latest: bool = True,
) -> Path:
    """Write a checkpoint; called by every rank.

    Args:
        client_state: anything JSON can hold, given back by `load` (data position, best metric).

    Raises:
        ConfigError: the client state is not JSON.
        CheckpointError: a rank could not write; the temporary folder is removed, `latest` is as before.
    """
    tag = tag or f"global_step{engine.global_steps}"
    final = Path(directory) / tag
    part = part_of(directory, tag)
    rank, world = dist.get_rank(), dist.get_world_size()
    metadata = _metadata(engine, client_state)
    model = weights.gather(engine.module)

    def prepare() -> None:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def write() -> None:
        suffix = f"{rank:05d}-of-{world:05d}.safetensors"
        write_shards(engine.optimizer.shards(), part / f"optimizer-{suffix}")
        save_file(random_state.capture(), part / f"random-{suffix}")
        if rank == 0:
            save_file(model, part / MODEL, metadata={"format": "pt"})
            (part / METADATA).write_text(json.dumps(metadata, indent=1))
            flush(part / MODEL)
            flush(part / METADATA)
        # Only what this rank wrote: other ranks' temporary files come and go.
        flush(part / f"optimizer-{suffix}")
        flush(part / f"random-{suffix}")

    def give_name() -> None:
        if rank == 0:
            publish(directory, tag, save_latest)

    try:
        for stage in (prepare, write, give_name):
            _together(stage, f"checkpoint {final} could not be written")
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def _metadata(engine: SlimFitEngine, client_state: Mapping[str, Any]) -> dict[str, Any]:
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in engine.optimizer.param_groups
    ]
    scheduler = engine.lr_scheduler
    parts: dict[str, Any] = {
        "format": FORMAT,
        "world_size": dist.get_world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "schedule": engine.schedule.state_dict(),
        "optimizer": engine.optimizer.state_dict(),
        "steps": engine.optimizer.shard_steps(),
        "columns": column_places(engine.module),
        "parameter_groups": groups,
        "lr_scheduler": scheduler.state_dict() if scheduler is not None else None,
        "client_state": dict(client_state),
    }
    problems = []
    for key, value in parts.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            problems.append(
                f"checkpoint: {key} must hold JSON types only ({error}); convert it before saving"
            )
    if problems:
        raise ConfigError(problems)
    return parts


def _together(action: Callable[[], None], what: str) -> None:
    """Run an action on every rank; if it fails on one, all raise the same error."""
    problem = None
    try:
        action()
    except Exception as error:
        problem = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise CheckpointError(f"{what}: {'; '.join(p for p in problems if p)}")


def load(
    engine: SlimFitEngine,
    directory: str | os.PathLike,
    tag: str | None,
    optimizer_states: bool = True,
    lr_scheduler: bool = True,
    schedule: bool = True,
) -> tuple[str | None, dict[str, Any]]:
    """Go on from a checkpoint; called by every rank.

    Returns:
        The checkpoint's path and its client state; `(None, {})` where the folder names no checkpoint.

    Raises:
        CheckpointError: not a whole checkpoint of this format.
        ConfigError: it is of another model; names the layers or weights that differ.
    """
    tag = tag or latest_tag(directory)
    if tag is None:
        return None, {}
    path = Path(directory) / tag
    if dist.get_rank() == 0:
        recover(directory, tag)
    dist.barrier()
    metadata = read_metadata(path)
    with safe_open(path / MODEL, framework="pt") as file:
        weights.check_names(engine.module, set(file.keys()))
        _check_columns(metadata.get("columns", {}), column_places(engine.module))
        if schedule:
            engine.schedule.load_state_dict(metadata["schedule"])
        weights.scatter(engine.module, file.get_tensor)
    if optimizer_states:
        engine.optimizer.load_state_dict(metadata["optimizer"])
        with ShardReader(sorted(path.glob("optimizer-*.safetensors"))) as reader:
            engine.optimizer.load_shards(reader, metadata["steps"])
        saved = metadata["parameter_groups"]
        if len(saved) == len(engine.optimizer.param_groups):
            for group, options in zip(engine.optimizer.param_groups, saved, strict=True):
                group.update(options)
    if lr_scheduler and engine.lr_scheduler is not None and metadata["lr_scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(metadata["lr_scheduler"])
    if schedule:
        for name, value in metadata["counters"].items():
            setattr(engine, name, value)
        own = path / f"random-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
        if own.is_file():
            random_state.restore(own)
    return str(path), metadata["client_state"]


def _check_columns(saved: Mapping[str, Sequence[Any]], own: Mapping[str, Sequence[Any]]) -> None:
    """Whether the trained columns of a checkpoint stand where those of the model do."""
    differing = [name for name in own if name not in saved or Split(*saved[name]) != Split(*own[name])]
    if differing:
        name = differing[0]
        raise ConfigError(
            [
                f"slimfit.freeze: the checkpoint trains other columns of {len(differing)} layers than policy columns chooses "
                f"now ({name}: start, stride, count, transposed, rows {list(saved.get(name, ()))}, now {list(own[name])}); resume with "
                f"the rate and the seed of that run, or export the checkpoint and start from its whole weights"
            ]
        )


def load_states_of(path: str | os.PathLike) -> dict[str, Tensor]:
    """The most exact weights of a checkpoint: float32 masters where there are any, else the weights.

    The counterpart of DeepSpeed's `zero_to_fp32`, without a model or a process group.

    Returns:
        Name -> tensor in the shape of the weight; float32 for floating-point tensors.
    """
    folder = Path(path)
    if (tag := latest_tag(folder)) is not None:
        folder = folder / tag
    metadata = read_metadata(folder)
    result: dict[str, Tensor] = {}
    with (
        safe_open(folder / MODEL, framework="pt") as model,
        ShardReader(sorted(folder.glob("optimizer-*.safetensors"))) as reader,
    ):
        for name in model.keys():  # noqa: SIM118 - safe_open is no mapping
            weight = model.get_tensor(name)
            if weight.is_floating_point():
                weight = weight.to(torch.float32)
            flat = weight.view(-1)
            reader.read_into(flat, name, "master", 0)
            result[name] = weight
    return fill_columns(result, metadata.get("columns", {}))
