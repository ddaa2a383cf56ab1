"""Checkpoints that another world size, ZeRO stage or residency can go on from, and that run no code.

The files are those of `engine.checkpoint_files`. Everything is written into a temporary folder, flushed to disk,
renamed, and only then named in `latest`: whatever happens in between, `latest` names a whole checkpoint. All ranks
must see one file system.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from slimfit_ds.deltas.base import BaseTensors
from slimfit_ds.deltas.delta import DELTA, Source, read_delta, write_into
from slimfit_ds.engine import weights
from slimfit_ds.engine.checkpoint_files import (
    FORMAT,
    METADATA,
    MODEL,
    CheckpointError,
    ShardReader,
    latest_tag,
    part_of,
    publish,
    random_states,
    read_metadata,
    recover,
    restore_random_states,
    write_shards,
)
from slimfit_ds.errors import ConfigError
from slimfit_ds.files import flush
from slimfit_ds.schedule.schedule import FreezeSchedule
from slimfit_ds.trainable.split import check_columns, column_places, fill_columns
from slimfit_ds.trainable.units import named_tensors

__all__ = ["CheckpointError", "TrainingState", "latest_tag", "load", "save"]


@dataclass(frozen=True)
class TrainingState:
    """The parts of an engine that a checkpoint holds."""

    module: nn.Module
    optimizer: Any
    """A `FreezeOptimizer`."""
    schedule: FreezeSchedule
    lr_scheduler: Any
    zero_stage: int
    counters: dict[str, int]
    """Steps, samples and the like; `load` changes them."""
    source: Source
    """The module and its base."""
    trained: Collection[str] | None = None
    """Names of the parameters that have trained: a checkpoint holds these. None: it holds whole weights."""


def save(
    state: TrainingState,
    directory: str | os.PathLike,
    tag: str | None,
    client_state: Mapping[str, Any],
    save_latest: bool = True,
    exclude: Iterable[str] = (),
) -> Path:
    """Write a checkpoint; called by every rank.

    Args:
        client_state: anything JSON can hold, given back by `load` (data position, best metric).
        exclude: names of weights that are left out.

    Raises:
        ConfigError: the client state is not JSON.
        CheckpointError: a rank could not write, or ranks give different tags; the temporary folder is removed, `latest` is
            as before.
    """
    tag = str(tag or f"global_step{state.counters['global_steps']}")
    final = Path(directory) / tag
    part = part_of(directory, tag)
    rank, world = dist.get_rank(), dist.get_world_size()
    tags: list[str] = [""] * world
    dist.all_gather_object(tags, tag)
    if len({*tags}) > 1:
        raise CheckpointError(
            f"ranks give the checkpoint different tags, {', '.join(tags)}: give the same on all"
        )
    excluded = sorted(exclude)
    metadata = {**_metadata(state, client_state), "excluded": excluded}
    delta = model = None
    if state.trained is None:
        model = weights.gather(state.module, excluded)
    else:
        delta = weights.gather_delta(state.module, state.source, state.trained)
    held = MODEL if delta is None else DELTA

    def prepare() -> None:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def write() -> None:
        suffix = f"{rank:05d}-of-{world:05d}.safetensors"
        write_shards(state.optimizer.shards(), part / f"optimizer-{suffix}")
        save_file(random_states(), part / f"random-{suffix}")
        if rank == 0:
            if delta is not None:
                write_into(delta, part / DELTA)
            elif model is not None:
                save_file(model, part / MODEL, metadata={"format": "pt"})
            (part / METADATA).write_text(json.dumps(metadata, indent=1))
            flush(part / held)
            flush(part / METADATA)
        # Only what this rank wrote: other ranks' temporary files come and go.
        flush(part / f"optimizer-{suffix}")
        flush(part / f"random-{suffix}")

    def give_name() -> None:
        if rank == 0:
            publish(directory, tag, save_latest)

    try:
        for stage in (prepare, write, give_name):
            together(stage, f"checkpoint {final} could not be written")
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def _metadata(state: TrainingState, client_state: Mapping[str, Any]) -> dict[str, Any]:
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in state.optimizer.param_groups
    ]
    scheduler = state.lr_scheduler
    parts: dict[str, Any] = {
        "format": FORMAT,
        "world_size": dist.get_world_size(),
        "zero_stage": state.zero_stage,
        "counters": state.counters,
        "schedule": state.schedule.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "steps": state.optimizer.shard_steps(),
        "columns": column_places(state.module),
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


def together(action: Callable[[], None], what: str) -> None:
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
    state: TrainingState,
    directory: str | os.PathLike,
    tag: str | None,
    optimizer_states: bool = True,
    lr_scheduler: bool = True,
    schedule: bool = True,
    strict: bool = True,
    custom_load_fn: Callable[..., Any] | None = None,
) -> tuple[str | None, dict[str, Any]]:
    """Go on from a checkpoint; called by every rank.

    Args:
        optimizer_states, lr_scheduler, schedule: what is read beside the weights; with the schedule come counters and
            random states.
        strict: the names of the weights must be the model's. If not, the schedule of other layers starts afresh.
        custom_load_fn: sets the weights instead, see `weights.load_by`; `strict` does not count then, as in DeepSpeed.

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
    is_delta = (path / DELTA).is_file()
    if is_delta and custom_load_fn is not None:
        raise ConfigError(
            [f"load_checkpoint: custom_load_fn reads whole weights, and {path} holds a delta: leave it out"]
        )
    if is_delta:
        read_delta(path, names=()).base.require(state.source.base, f"the checkpoint {path}")
    with safe_open(path / (DELTA if is_delta else MODEL), framework="pt") as file:
        saved = set(file.keys())
        present = {name for name, _ in named_tensors(state.module)} if is_delta else set()
        if strict and custom_load_fn is None:
            weights.check_names(state.module, saved | set(metadata.get("excluded", ())) | present)
        check_columns(metadata.get("columns", {}), column_places(state.module))
        if schedule:
            _load_schedule(state.schedule, metadata["schedule"], strict)
        state.source.forget()
        if is_delta:
            _restore_base(state, saved)
        if custom_load_fn is None:
            weights.scatter(state.module, file.get_tensor, saved)
        else:
            found = {name: file.get_tensor(name) for name in saved}
            weights.load_by(custom_load_fn, state.module, fill_columns(found, metadata.get("columns", {})))
    if optimizer_states:
        state.optimizer.load_state_dict(metadata["optimizer"])
        with ShardReader(sorted(path.glob("optimizer-*.safetensors"))) as reader:
            state.optimizer.load_shards(reader, metadata["steps"])
        if custom_load_fn is not None:
            state.optimizer.updater.refresh_masters(changed_only=True)
        groups = metadata["parameter_groups"]
        if len(groups) == len(state.optimizer.param_groups):
            for group, options in zip(state.optimizer.param_groups, groups, strict=True):
                group.update(options)
    else:
        state.optimizer.refresh_fp32_params()
    if lr_scheduler and state.lr_scheduler is not None and metadata["lr_scheduler"] is not None:
        state.lr_scheduler.load_state_dict(metadata["lr_scheduler"])
    if schedule:
        state.counters.update(metadata["counters"])
        own = path / f"random-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.safetensors"
        if own.is_file():
            restore_random_states(own)
    return str(path), metadata["client_state"]


def _load_schedule(schedule: FreezeSchedule, saved: Mapping[str, Any], strict: bool) -> None:
    try:
        schedule.load_state_dict(saved)
    except ConfigError as error:
        if strict:
            raise
        warnings.warn(f"{error.problems[0]}: the schedule of layers starts afresh", stacklevel=4)


def _restore_base(state: TrainingState, saved: Collection[str]) -> None:
    """Make what a delta does not hold the base's, whatever has become of it since.

    Raises:
        CheckpointError: the base does not have it.
    """
    source = state.source
    # A delta has all buffers; of a model without any it says nothing of others.
    changed = [name for name in source.names(saved) if name not in saved]
    with BaseTensors(state.module, source.folder) as tensors:
        found = {name: tensors.get(name) for name in changed}
        lacking = [name for name, tensor in found.items() if tensor is None]
        if lacking:
            raise CheckpointError(
                f"neither the checkpoint nor its base {source.base.name!r} has {lacking[0]} ({len(lacking)} weights)"
            )
        weights.scatter(state.module, lambda name: found[name], found)  # type: ignore[arg-type,return-value]
    source.forget()
