"""Run under a launcher: train steps FIRST to LAST of a fixed run, from one checkpoint into another.

The global batch of each step is the same whatever the number of ranks. Prints losses and active sets.
"""

from __future__ import annotations

import argparse
import json

import deepspeed
import torch
from stage_matrix_worker import batch_of, tiny_bert

import slimfit_ds

ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, required=True)
    parser.add_argument("--first", type=int, required=True)
    parser.add_argument("--last", type=int, required=True)
    parser.add_argument("--load")
    parser.add_argument("--save")
    parser.add_argument("--inactive", default="device")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--policy", default="ils")
    parser.add_argument("--front", default="none")
    parser.add_argument("--pretrained")
    parser.add_argument("--base", help="checkpoints are deltas of this folder")
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = {
        "train_batch_size": ROWS,
        "gradient_clipping": 0.05,
        "zero_optimization": {"stage": arguments.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 40, "warmup_num_steps": 2}},
        "bf16": {"enabled": arguments.dtype == "bf16"},
        "slimfit": {
            "freeze": {"rate": 0.8, "policy": arguments.policy, "front": arguments.front},
            "optimizer_states": {"inactive": arguments.inactive},
            "checkpoints": "delta" if arguments.base else "whole",
        },
    }
    model = tiny_bert()
    if arguments.base:
        if rank == 0:
            model.save_pretrained(arguments.base)
        torch.distributed.barrier()
        model = type(model).from_pretrained(arguments.base)
    engine, *_ = slimfit_ds.initialize(model=model, config=config)
    client = {}
    if arguments.load:
        _, client = engine.load_checkpoint(arguments.load)
        assert client == {"next_step": arguments.first}, client
        assert engine.global_steps == arguments.first
    history = []
    for step in range(arguments.first, arguments.last):
        whole = batch_of(step, 0, 0, size=ROWS)
        share = ROWS // world
        batch = {key: value[rank * share : (rank + 1) * share] for key, value in whole.items()}
        active = sorted(engine.active_layers)
        loss = engine(**batch).loss
        engine.backward(loss)
        lr = engine.get_lr()[0]
        engine.step()
        mean = loss.detach().float().clone()
        torch.distributed.all_reduce(mean)
        history.append({"step": step, "loss": mean.item() / world, "lr": lr, "active": active})
    if arguments.save:
        engine.save_checkpoint(arguments.save, client_state={"next_step": arguments.last})
    if arguments.pretrained:
        engine.save_pretrained(arguments.pretrained)
        if arguments.stage == 3:
            state = engine._zero3_consolidated_16bit_state_dict()
            if rank == 0:
                torch.save(state, f"{arguments.pretrained}/consolidated.pt")
    if rank == 0:
        print("RESULT " + json.dumps(history), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
