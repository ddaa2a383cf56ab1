"""Run under a launcher: ranks are given schedules that differ after a step; prints what each rank says."""

from __future__ import annotations

import argparse
import json

import deepspeed
import torch
from stage_matrix_worker import batch_of, tiny_bert

import slimfit_ds
from slimfit_ds.engine.engine import ActiveSetMismatchError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, default=1)
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": arguments.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "slimfit": {"freeze": {"policy": "ils", "rate": 0.9}},
    }
    engine, *_ = slimfit_ds.initialize(model=tiny_bert(), config=config)
    names = sorted(engine.active_layers)
    said = None
    for step in range(3):
        if rank == 1 and step == 1:
            # As a rank would that resumed from another checkpoint.
            state = engine.schedule.state_dict()
            state["state"]["distance"].reverse()
            engine.schedule.load_state_dict(state)
        try:
            engine.backward(engine(**batch_of(step, 0, rank)).loss)
            engine.step()
        except ActiveSetMismatchError as error:
            said = {"step": step, "message": str(error)}
            break
    everyone: list = [None, None]
    torch.distributed.all_gather_object(everyone, said)
    if rank == 0:
        print("RESULT " + json.dumps([everyone, names]), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
