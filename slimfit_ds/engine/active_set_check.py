"""Ranks must train the same layers: a hash of the active set is compared before anything is sent.

On a stock engine ranks that freeze different layers of one size train on silently, and hang otherwise.
"""

from __future__ import annotations

import torch
from deepspeed import comm as dist

from slimfit_ds.schedule.schedule import FreezeSchedule

__all__ = ["ActiveSetMismatchError", "check_active_set"]


class ActiveSetMismatchError(RuntimeError):
    """Ranks are about to train different layers."""


def check_active_set(schedule: FreezeSchedule, group, device: torch.device) -> None:
    """Compare the coming active set across ranks: one int64 each.

    Raises:
        ActiveSetMismatchError: on every rank, naming the ranks and the layers that differ.
    """
    world = dist.get_world_size(group=group)
    if world == 1:
        return
    mine = torch.tensor([schedule.fingerprint()], dtype=torch.int64, device=device)
    everyone = torch.empty(world, dtype=torch.int64, device=device)
    dist.allgather_fn(everyone, mine, group=group)
    if len(set(everyone.tolist())) == 1:
        return
    sets: list = [None] * world
    dist.all_gather_object(sets, (schedule.step, sorted(schedule.active_names)), group=group)
    step0, names0 = sets[0]
    lines = []
    for rank, (step, names) in enumerate(sets):
        extra, missing = sorted(set(names) - set(names0)), sorted(set(names0) - set(names))
        if step != step0 or extra or missing:
            lines.append(f"rank {rank} (step {step}) trains {extra} and not {missing}")
    raise ActiveSetMismatchError(
        f"ranks would train different layers; against rank 0 (step {step0}): {'; '.join(lines)}. "
        "Resume all ranks from one checkpoint and give them the same slimfit block."
    )
